"""All that is known of one data set in COCO's format before a run: names, boxes, images."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Callable, Optional

from mmdet_gdino_lora.checks.alike import check_alike
from mmdet_gdino_lora.checks.annotations import Boxes, check_annotations, places_read
from mmdet_gdino_lora.checks.classes import check_boxed, check_classes
from mmdet_gdino_lora.checks.coco_file import check_entries, read_coco, uncollected, usable
from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.images import check_images
from mmdet_gdino_lora.checks.names import check_names, reader_of


def check_coco(
    key: str,
    dataset: Mapping[str, Any],
    classes: Sequence[str],
    model: Mapping[str, Any],
    trains: bool,
) -> list[Finding]:
    """Checks a data set whose files are on this machine.

    What comes later stands on what comes before: behind a fatal finding nothing more is looked at.

    Args:
        key: Where it stands in the config, such as ``train_dataloader.dataset``.
        dataset: Its config.
        classes: Names that it will use.
        model: The model's config, whose text model reads the names.
        trains: Whether it is trained from; else it is measured on.

    Returns:
        Findings.

    Raises:
        ConfigError: The annotation file is none, or no caption can be made of the names.
    """
    findings: list[Finding] = []
    with uncollected():
        for stage in Looked(key, dataset, classes, model, trains).stages():
            found = stage()
            findings += found
            if any(finding.fatal for finding in found):
                break
    return findings


class Looked:
    """A data set that is looked at, one thing after the other.

    Args:
        key: Where it stands in the config.
        dataset: Its config.
        classes: Names that it will use.
        model: The model's config.
        trains: Whether it is trained from.
        thorough: Whether the rest is looked at where something can't be read, and what may be meant
            so is told, too.
        bar: Whether a bar shows how many images were looked at.

    Attributes:
        coco: Its annotation file, without the entries that mmdet can't read.
        names: Names that it will use.

    Raises:
        ConfigError: The annotation file is none.
    """

    def __init__(
        self,
        key: str,
        dataset: Mapping[str, Any],
        classes: Sequence[str],
        model: Mapping[str, Any],
        trains: bool,
        thorough: bool = False,
        bar: bool = False,
    ) -> None:
        self.key, self.dataset, self.model = key, dataset, model
        self.names = list(classes)
        self.trains, self.thorough, self.bar = trains, thorough, bar
        path = os.path.join(dataset.get('data_root') or '', dataset['ann_file'])
        self._read = read_coco(path, f'{key}.ann_file={path!r}')
        self.coco = usable(self._read)

    def stages(self) -> list[Callable[[], list[Finding]]]:
        """What is looked at, in its order: what comes later stands on what comes before."""
        return [self._entries, self._classes, self._words, self._annotations, self._images]

    @cached_property
    def boxes(self) -> Boxes:
        """Its annotations in arrays."""
        return Boxes.of(self.coco, self.names)

    @cached_property
    def images(self) -> list[dict[str, Any]]:
        """Entries of the images that mmdet reads."""
        test_mode = self.dataset.get('test_mode')
        rules = {} if test_mode else self.dataset.get('filter_cfg') or {}
        filter_empty, min_size = rules.get('filter_empty_gt', False), rules.get('min_size', 0)
        places = places_read(self.boxes, filter_empty, min_size, self.dataset.get('indices'))
        return [self.coco.images[place] for place in places]

    @property
    def folder(self) -> Optional[str]:
        """Folder of the images; None where they can't be looked at."""
        root, prefix = self.dataset.get('data_root') or '', self.dataset.get('data_prefix') or {}
        folder = os.path.join(root, prefix.get('img', ''))
        return None if '://' in folder or _image_loader(self.dataset) is None else folder

    def _entries(self) -> list[Finding]:
        found = check_entries(self._read)
        # Of ids that are there twice nothing is told beside entries that lack something.
        return list(dict.fromkeys([*found, *check_entries(self.coco)])) if self.thorough else found

    def _classes(self) -> list[Finding]:
        found = check_classes(self.key, self.names, self.coco, self.trains)
        self.names = [name for name in self.names if isinstance(name, str)]
        if self.thorough:  # a run may well mean it so: names as negatives, a subset to try
            found += check_boxed(self.key, self.names, self.coco, self.trains)
            found += check_alike(self.key, self.names)
        return found

    def _words(self) -> list[Finding]:
        reader = reader_of(self.model, self.dataset)
        if reader is None or not self.names:
            return []
        prompts = self.dataset.get('caption_prompt')
        return check_names(self.key, self.names, prompts, reader, self.trains)

    def _annotations(self) -> list[Finding]:
        return check_annotations(self.boxes, self.trains, self.thorough)

    def _images(self) -> list[Finding]:
        loader = _image_loader(self.dataset)
        # The other processes of this machine would see the same files.
        if loader is None or os.environ.get('LOCAL_RANK', '0') != '0':
            return []
        if self.folder is None or not self.images:
            return []
        tolerant = loader.get('ignore_empty', False)
        return check_images(self.coco.where, self.folder, self.images, tolerant, self.bar)


def _image_loader(dataset: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The pipeline's step that reads images from this disk as OpenCV shows them, if it has one."""
    for step in dataset.get('pipeline') or ():
        if step.get('type') == 'LoadImageFromFile':
            is_usual = (
                step.get('imdecode_backend', 'cv2') == 'cv2'
                and step.get('color_type', 'color') == 'color'
                and (step.get('backend_args') or {}).get('backend', 'local') == 'local'
            )
            return step if is_usual else None
    return None

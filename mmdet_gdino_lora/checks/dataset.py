"""All that is known of one data set in COCO's format before a run: names, boxes, images."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmdet_gdino_lora.checks.annotations import Boxes, check_annotations, places_read
from mmdet_gdino_lora.checks.classes import check_classes
from mmdet_gdino_lora.checks.coco_file import CocoFile, check_entries, read_coco, uncollected
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
    path = os.path.join(dataset.get('data_root') or '', dataset['ann_file'])
    findings: list[Finding] = []
    with uncollected():
        coco = read_coco(path, f'{key}.ann_file={path!r}')
        for found in _in_order(key, dataset, classes, model, trains, coco):
            findings += found
            if any(finding.fatal for finding in found):
                break
    return findings


def _in_order(
    key: str,
    dataset: Mapping[str, Any],
    classes: Sequence[str],
    model: Mapping[str, Any],
    trains: bool,
    coco: CocoFile,
) -> Iterator[list[Finding]]:
    yield check_entries(coco)
    yield check_classes(key, classes, coco, trains)
    reader = reader_of(model, dataset)
    if reader is not None:
        yield check_names(key, classes, dataset.get('caption_prompt'), reader, trains)
    boxes = Boxes.of(coco, classes)
    yield check_annotations(boxes, trains)
    loader = _image_loader(dataset)
    # The other processes of this machine would see the same files.
    if loader is None or os.environ.get('LOCAL_RANK', '0') != '0':
        return
    rules = {} if dataset.get('test_mode') else dataset.get('filter_cfg') or {}
    places = places_read(
        boxes, rules.get('filter_empty_gt', False), rules.get('min_size', 0), dataset.get('indices')
    )
    root, prefix = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
    folder = os.path.join(root, prefix.get('img', ''))
    if places and '://' not in folder:
        images = [coco.images[place] for place in places]
        yield check_images(coco.where, folder, images, loader.get('ignore_empty', False))


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

"""All that can be said of a config's data, to the end, where a run would stop at the first."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np

from mmdet_gdino_lora.checks.coco_file import uncollected
from mmdet_gdino_lora.checks.copies import check_repeated, check_shared, contents_of
from mmdet_gdino_lora.checks.dataset import Looked
from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.names import reader_of
from mmdet_gdino_lora.checks.walk import datasets_of
from mmdet_gdino_lora.checks.words import share
from mmdet_gdino_lora.engine.preflight import config_classes, is_looked_at
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text import CaptionTokenizer, prompted
from mmdet_gdino_lora.text.prompts import renamed


@dataclasses.dataclass
class Surveyed:
    """One data set.

    Attributes:
        key: Where it stands in the config.
        looked: What was read of it; None where nothing could be.
        findings: What is not as it should be.
        notes: What is as it may be, and what becomes of it.
    """

    key: str
    looked: Optional[Looked] = None
    findings: list[Finding] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        """Of the images that are read, where they are on this disk."""
        if self.looked is None or self.looked.folder is None:
            return []
        folder = self.looked.folder
        return [os.path.join(folder, image['file_name']) for image in self.looked.images]

    @property
    def boxes(self) -> Counter[str]:
        """Boxes by class name, as the file has them."""
        if self.looked is None:
            return Counter()
        names = {category['id']: category['name'] for category in self.looked.coco.categories}
        return Counter(names.get(a['category_id'], '') for a in self.looked.coco.annotations)


def survey(cfg: Mapping[str, Any], bar: bool = True) -> list[Surveyed]:
    """Looks at the data that a config trains from and measures on.

    Args:
        cfg: The runner's config.
        bar: Whether a bar shows how many images were looked at.

    Returns:
        One for each data set; those of the test loader only where they differ from validation's.
    """
    loaders = {f'{stage}_dataloader': cfg.get(f'{stage}_dataloader') for stage in _STAGES}
    if loaders['test_dataloader'] == loaders['val_dataloader']:
        del loaders['test_dataloader']
    with uncollected():
        sets = [
            _surveyed(key, dataset, cfg.get('model') or {}, bar)
            for name, loader in loaders.items()
            for key, dataset in datasets_of(name, loader)
        ]
        _add_copies(sets)
    _say_once(sets)
    return sets


_STAGES = ('train', 'val', 'test')


def _surveyed(
    key: str, dataset: Mapping[str, Any], model: Mapping[str, Any], bar: bool
) -> Surveyed:
    result = Surveyed(key)
    trains = key.startswith('train_')
    try:
        if not is_looked_at(key, dataset):
            kind = getattr(dataset['type'], '__name__', dataset['type'])
            result.notes.append(f'{key}: a {kind} that is not in COCO format here: not looked at')
            return result
        classes = config_classes(key, dataset)
        result.looked = Looked(key, dataset, classes, model, trains, thorough=True, bar=bar)
    except ConfigError as error:
        result.findings.append(Finding(str(error), fatal=True))
        return result
    for stage in result.looked.stages():
        try:
            result.findings += stage()
        except ConfigError as error:
            result.findings.append(Finding(str(error), fatal=True))
    result.notes += _notes(result.looked)
    return result


def _notes(looked: Looked) -> Iterator[str]:
    where, images = looked.coco.where, looked.coco.images
    ids = [category['id'] for category in looked.coco.categories]
    if ids not in (list(range(len(ids))), list(range(1, len(ids) + 1))):
        yield (
            f'{where}: the category ids are not 1, 2, 3, ... ({ids[0]!r} to {ids[-1]!r}); mmdet '
            f'numbers labels 0 to {len(looked.names) - 1} in the order of the file, and metrics '
            'and results have the ids of the file'
        )
    boxed = set(looked.boxes.image[looked.boxes.wanted].tolist())
    empty = [image['file_name'] for place, image in enumerate(images) if place not in boxed]
    if empty:
        rules = {} if looked.dataset.get('test_mode') else looked.dataset.get('filter_cfg') or {}
        fate = 'all in them is learned as background'
        if not looked.trains:
            fate = 'whatever is found in them is wrong'
        elif rules.get('filter_empty_gt'):
            fate = 'filter_cfg.filter_empty_gt=True leaves them out'
        yield (
            f'{where}: {share(len(empty), len(images), "images")} have no box, and {fate}; first: '
            f'{empty[0]}'
        )
    unread = len(images) - len(looked.images)
    if unread:
        yield (
            f'{where}: {share(unread, len(images), "images")} are not read, by filter_cfg '
            '(filter_empty_gt, min_size) or indices'
        )
    crowds = sum(bool(a.get('iscrowd')) for a in looked.coco.annotations)
    if crowds:
        fate = 'not learned' if looked.trains else 'neither to be found nor wrong to find'
        yield (
            f'{where}: {share(crowds, len(looked.coco.annotations), "boxes")} are crowds '
            f'(iscrowd=1): {fate}'
        )


def _say_once(sets: Sequence[Surveyed]) -> None:
    """What is said of the names to train is not said again of the same names to measure."""
    said: set[str] = set()
    for one in sets:
        words = f'{one.key}.metainfo.classes'
        one.findings = [
            finding
            for finding in one.findings
            if not finding.sentence.startswith(words)
            or finding.sentence.removeprefix(words) not in said
        ]
        said |= {f.sentence.removeprefix(words) for f in one.findings}


def _add_copies(sets: Sequence[Surveyed]) -> None:
    trained: dict[str, str] = {}
    known = contents_of([path for one in sets for path in one.paths])
    for one in sets:  # those to train from come first
        if one.looked is None:
            continue
        where = one.looked.coco.where
        if one.looked.trains:
            found, first = check_repeated(where, one.paths, known)
            trained.update(first)
        else:
            found = check_shared(where, one.paths, known, trained)
        one.findings += found


def tokens_of(looked: Looked) -> Optional[tuple[np.ndarray, int]]:
    """Counts the tokens of a data set's names in a caption.

    Args:
        looked: The data set.

    Returns:
        Tokens of each name with the dot behind it [N], and how many a caption may have; None where
        the text model is not on this machine, or can't read a name.
    """
    reader = reader_of(looked.model, looked.dataset)
    if reader is None:
        return None
    names = renamed(prompted(looked.names, looked.dataset.get('caption_prompt')), reader.prompts)
    try:
        lengths = CaptionTokenizer(reader.text_model, reader.max_tokens).lengths(names)
    except ConfigError:  # which is told among the findings
        return None
    return lengths, reader.max_tokens

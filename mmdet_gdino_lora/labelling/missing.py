"""Labels that may be missing: a guess, of a detector that finds the labelled things well.

Boxes where a detector is sure and nobody has labelled anything are missing labels, or mistakes of
the detector. They are counted as :mod:`~.labelling.completion` does, among the surest, and only of
classes of which there is evidence that it knows them; of the others nothing is said.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

import numpy as np

from mmdet_gdino_lora.checks.coco_file import CocoFile
from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.words import share
from mmdet_gdino_lora.labelling.completion import LEAST, SUREST, odds_among, sort_all
from mmdet_gdino_lora.labelling.detections import Found

#: IoU with any label from which on a detection is of a thing that has one.
BESIDE = 0.3
#: What a detector has to do before it is believed of a class: find this share of its labels again,
#: with half of them above this score.
FOUND, SCORE = 0.7, 0.3
#: Of the surest detections that lie on labels, most that may be mistakes.
MISTAKEN = 0.1
#: Standard errors by which the share of missing labels is taken lower, and what it has to be then.
CAUTION, TOLD = 2.0, 0.1


@dataclasses.dataclass
class Counted:
    """What a detector finds of one class, beside the labels.

    Attributes:
        name: Of the class.
        labels: Boxes that are labelled, crowds left out.
        on_labels: Scores of the detections on them, one for each.
        free: Scores of those that overlap no label, and the photo and the box of each.
        mistaken: Scores of those on labels that are of another class, or badly placed.
    """

    name: str
    labels: int = 0
    on_labels: list[float] = dataclasses.field(default_factory=list)
    free: list[tuple[float, str, Sequence[float]]] = dataclasses.field(default_factory=list)
    mistaken: list[float] = dataclasses.field(default_factory=list)

    @property
    def surest(self) -> Optional[float]:
        """From which score on half of the labels are found; None: the class isn't known well."""
        if len(self.on_labels) < max(LEAST / SUREST, FOUND * self.labels):
            return None
        score = sorted(self.on_labels, reverse=True)[: -(-self.labels // 2)][-1]
        sure = self.among(score)
        others = sum(one >= score for one in self.mistaken)
        if score < SCORE or others > MISTAKEN * (sure + others):
            return None
        return score

    def among(self, score: float) -> int:
        """Detections on labels with at least a score."""
        return sum(one >= score for one in self.on_labels)

    def beside(self, score: float) -> list[tuple[float, str, Sequence[float]]]:
        """Detections that overlap no label with at least a score, the surest first."""
        return sorted((one for one in self.free if one[0] >= score), reverse=True)

    def missing(self) -> Optional[float]:
        """Things without a label for every one that has one; None where that can't be told.

        If labels are missing by chance these are as many among the surest half of the detections
        as among the surest quarter; mistakes become more where it is less sure. The lower of the
        two is taken.
        """
        score = self.surest
        if score is None:
            return None
        sure = np.array([one for one in self.on_labels if one >= score])
        odds = []
        for lowest in (score, float(np.quantile(sure, 0.5, method='nearest'))):
            labelled, free = self.among(lowest), len(self.beside(lowest))
            odds.append(odds_among(labelled, free))
        return max(0.0, min(odds))

    def is_told(self) -> bool:
        """Whether it is more than chance and a few mistakes of a sure detector would make."""
        odds, score = self.missing(), self.surest
        if not odds or score is None:
            return False
        error = np.sqrt(1 / len(self.beside(score)) + 1 / self.among(score))
        return bool(odds * np.exp(-CAUTION * error) >= TOLD)


def sample_of(images: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Draws images, the same ones every time.

    Args:
        images: Entries of those that are trained from.
        most: How many.

    Returns:
        Entries, in the order of the file.
    """
    chosen = np.random.default_rng(0).permutation(len(images))[:most]
    return [images[place] for place in sorted(chosen)]


def count_beside(
    coco: CocoFile,
    images: Sequence[Mapping[str, Any]],
    found: Mapping[str, Found],
    names: Sequence[str],
) -> list[Counted]:
    """Holds detections against the labels of photos.

    Args:
        coco: The labels.
        images: Its entries of the photos that were looked at.
        found: In each, by ``file_name``.
        names: Class names, by which detections are numbered.

    Returns:
        One for each class.
    """
    counted = [Counted(name) for name in names]
    numbers = {c['id']: names.index(c['name']) for c in coco.categories if c['name'] in names}
    readable = [image for image in images if not found[image['file_name']].unreadable]
    ids = {image['id'] for image in readable}
    for box in coco.annotations:
        number = numbers.get(box['category_id'], -1)
        if box['image_id'] in ids and number >= 0 and not box.get('iscrowd', 0):
            counted[number].labels += 1
    for image, one, kinds in sort_all(readable, coco.annotations, numbers, found, BESIDE):
        for place in kinds.on_labels:
            counted[one.labels[place]].on_labels.append(one.scores[place])
        for place in kinds.free:
            told = one.scores[place], image['file_name'], one.boxes[place]
            counted[one.labels[place]].free.append(told)
        for place in kinds.mistaken:
            counted[one.labels[place]].mistaken.append(one.scores[place])
    return counted


def findings_of(
    where: str, folder: str, counted: Sequence[Counted], photos: int, who: str
) -> Iterator[Finding]:
    """Says of which classes labels seem to be missing.

    Args:
        where: The annotation file's key and path, as sentences begin.
        folder: Of the photos.
        counted: Of :func:`count_beside`.
        photos: How many were looked at.
        who: The detector, in words.

    Yields:
        Warnings: nothing of it is known for certain.
    """
    for one in counted:
        score, odds = one.surest, one.missing()
        if score is None or odds is None or not one.is_told():
            continue
        cases = [
            f'{os.path.join(folder, file)}, {one.name!r} at {_corners(box)} (score {sure:.2f})'
            for sure, file, box in one.beside(score)
        ]
        again = share(len(one.on_labels), one.labels, f'labelled boxes of {one.name!r}')
        yield Finding(
            f'{where}: labels of {one.name!r} seem to be missing, some {odds * one.labels:.0f} '
            f'beside {one.labels} in {photos} photos: a guess of {who}, which finds {again}, half '
            f'of them with a score from {score:.2f} on, and as surely {len(cases)} boxes that '
            'overlap no label; what is not labelled is learned as background; look at the photos, '
            f'and label what is there; first: {cases[0]}',
            cases=tuple(cases),
        )


def _corners(box: Sequence[float]) -> str:
    x, y, width, height = box
    return f'({x:.0f}, {y:.0f}) to ({x + width:.0f}, {y + height:.0f})'

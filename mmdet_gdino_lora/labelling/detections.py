"""What is found in one photo: boxes that are worth keeping, in numbers that a file can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask

if TYPE_CHECKING:
    from mmengine.structures import InstanceData

#: Detections of one class with a larger IoU are of the same thing; the surer one stays.
SAME = 0.7
#: Digits behind the point, of pixels and of scores.
PIXELS, SCORES = 2, 4


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found in one photo.

    Attributes:
        width: Of the image as it is loaded, in pixels.
        height: As well.
        boxes: Absolute (x, y, width, height), the surest first.
        scores: Of the boxes.
        labels: Of the boxes: places in the list of class names.
        unreadable: Why the photo can't be read; empty where it can.
    """

    width: int = 0
    height: int = 0
    boxes: list[list[float]] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    labels: list[int] = dataclasses.field(default_factory=list)
    unreadable: str = ''

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return dataclasses.asdict(self)

    def above(self, thresholds: Sequence[float]) -> list[int]:
        """Which boxes reach the threshold of their class.

        Args:
            thresholds: Of each class.

        Returns:
            Places in the lists.
        """
        return [
            place
            for place, (score, label) in enumerate(zip(self.scores, self.labels))
            if score >= thresholds[label]
        ]


def found_in(instances: InstanceData, height: int, width: int, lowest: float) -> Found:
    """Takes what is worth keeping of a detector's predictions.

    Args:
        instances: ``bboxes`` (absolute xyxy), ``scores`` and ``labels``.
        height: Of the image, in pixels.
        width: As well.
        lowest: Score below which nothing is kept.

    Returns:
        Boxes inside the image, of a pixel at least (mmdet passes over smaller ones), the surest
        first, and of several on one thing the surest alone.
    """
    corners = instances.bboxes.detach().float().cpu().numpy().astype(np.float64)
    corners = corners.reshape(-1, 4).clip(0, [width, height, width, height]).round(PIXELS)
    boxes = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).round(PIXELS)
    scores = instances.scores.detach().double().cpu().numpy().round(SCORES)
    labels = instances.labels.cpu().numpy()
    order = np.argsort(-scores, kind='stable')
    fit = order[(scores[order] >= lowest) & (boxes[order, 2:] >= 1).all(1)]
    stay = fit[_surest(boxes[fit], labels[fit])]
    return Found(width, height, boxes[stay].tolist(), scores[stay].tolist(), labels[stay].tolist())


def _surest(boxes: np.ndarray, labels: np.ndarray) -> list[int]:
    """Places of boxes, sorted by score, that lie on no surer box of their class."""
    double = (overlaps(boxes, boxes) > SAME) & (labels[:, None] == labels)
    stay: list[int] = []
    for place in range(len(boxes)):
        if not double[place, stay].any():
            stay.append(place)
    return stay


def overlaps(boxes: Any, others: Any, crowds: Sequence[int] = ()) -> np.ndarray:
    """IoU of every box with every other one.

    Args:
        boxes: [N, 4] of (x, y, width, height).
        others: [M, 4] of the same.
        crowds: M marks; of a marked one, the share of the box that lies in it is taken.

    Returns:
        [N, M].
    """
    one, other = (np.array(part, np.float64).reshape(-1, 4) for part in (boxes, others))
    if not len(one) or not len(other):
        return np.zeros((len(one), len(other)))
    return np.asarray(mask.iou(one, other, list(crowds) or [0] * len(other)))


def least_certain(
    found: Mapping[str, Found], thresholds: Sequence[float], count: int
) -> Iterable[str]:
    """Chooses the photos of which the detector is least certain.

    Args:
        found: In each photo.
        thresholds: Of each class.
        count: How many.

    Returns:
        Names of photos, in which a score is nearest to its class's threshold, above it or below;
        those come first that are nearest.
    """
    near = {
        name: min(abs(score - thresholds[label]) for score, label in zip(one.scores, one.labels))
        for name, one in found.items()
        if one.scores
    }
    return sorted(near, key=lambda name: (near[name], name))[:count]

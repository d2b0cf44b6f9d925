"""Boxes that leave a sample on its way through a pipeline, with all that is said of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

#: Annotations of the whole image.
_OF_THE_IMAGE = ('gt_seg_map', 'gt_sem_seg', 'gt_panoptic_seg')


def leave_out(results: dict, labels: Collection[int]) -> None:
    """Leaves out the boxes of some labels.

    Every per-box annotation goes with them: boxes, labels, flags, masks, and whatever else a key
    that begins with ``gt_`` holds for each box. Nothing is changed in place.

    Args:
        results: As mmdet's pipelines pass it on, behind the loading of annotations.
        labels: Labels whose boxes go.
    """
    if results.get('gt_bboxes_labels') is None:
        return
    of_boxes = np.asarray(results['gt_bboxes_labels'], dtype=np.int64)
    kept = ~np.isin(of_boxes, list(labels))
    if kept.all():
        return
    for key, value in list(results.items()):
        is_per_box = key.startswith('gt_') and key not in _OF_THE_IMAGE
        if is_per_box and hasattr(value, '__len__') and len(value) == len(kept):
            results[key] = _chosen(value, kept)


def _chosen(value: Any, kept: np.ndarray) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([one for one, keep in zip(value, kept) if keep])
    # By number: mmdet's masks take no flags, and all of its boxes and torch's tensors take both.
    return value[np.flatnonzero(kept)]

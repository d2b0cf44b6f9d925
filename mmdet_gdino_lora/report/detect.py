"""Runs the detector on a data set once, and keeps what it found beside the truth."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmdet_gdino_lora.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Seen:
    """One image: what is in it, and what was found.

    Attributes:
        path: Of the image.
        size: Width and height, pixels.
        truth: Boxes [N, 4], xyxy in the image's pixels.
        labels: Their classes [N].
        ignored: Which of them count neither as found nor as missed (crowds) [N].
        boxes: Found boxes [M, 4], the same.
        found: Their classes [M].
        scores: Their scores [M].
    """

    path: str
    size: tuple[int, int]
    truth: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    boxes: np.ndarray
    found: np.ndarray
    scores: np.ndarray


def validation_set(cfg: Mapping[str, Any]) -> Any:
    """Builds the data set of a config's validation.

    Args:
        cfg: The run's config.

    Returns:
        mmdet's data set.

    Raises:
        ConfigError: There is none, or none with classes.
    """
    from mmdet.registry import DATASETS

    loader = cfg.get('val_dataloader')
    if not loader:
        raise ConfigError(
            'val_dataloader is not set: a report measures the detector on the validation set; '
            "add val_dataloader and val_evaluator to the run's config"
        )
    dataset = DATASETS.build(loader['dataset'])
    if not dataset.metainfo.get('classes'):
        raise ConfigError(
            f'val_dataloader.dataset.type={loader["dataset"]["type"]!r} has no classes: a report '
            'measures detection by class; validate on a data set of type CocoDataset, say'
        )
    return dataset


def count(dataset: Any) -> tuple[int, np.ndarray]:
    """Counts a data set.

    Args:
        dataset: mmdet's.

    Returns:
        Number of images, and of boxes of each class.
    """
    boxes = np.zeros(len(dataset.metainfo.get('classes') or ()), dtype=int)
    for number in range(len(dataset)):
        for instance in dataset.get_data_info(number).get('instances', ()):
            if instance['bbox_label'] < len(boxes) and not instance.get('ignore_flag'):
                boxes[instance['bbox_label']] += 1
    return len(dataset), boxes


def detect(detector: Any, dataset: Any, loader: Mapping[str, Any]) -> list[Seen]:
    """Runs the detector on every image.

    Args:
        detector: In eval mode.
        dataset: Of :func:`validation_set`.
        loader: ``val_dataloader``, for the size of batches and the number of workers.

    Returns:
        Of each image what is in it and what was found, in the data set's order.
    """
    import torch
    from mmengine.dataset import pseudo_collate
    from mmengine.utils import ProgressBar
    from torch.utils.data import DataLoader

    batches = DataLoader(
        dataset,
        batch_size=loader.get('batch_size') or 1,
        num_workers=loader.get('num_workers') or 0,
        collate_fn=pseudo_collate,
    )
    progress, seen = ProgressBar(len(dataset)), list[Seen]()
    for batch in batches:
        with torch.no_grad():
            samples = detector.test_step(batch)
        for sample in samples:
            seen.append(_seen(dataset.get_data_info(len(seen)), sample))
            progress.update()
    print()
    return seen


def _seen(info: Mapping[str, Any], sample: Any) -> Seen:
    instances = [i for i in info['instances'] if i['bbox_label'] >= 0]
    found = sample.pred_instances
    height, width = sample.ori_shape[:2]
    return Seen(
        path=info['img_path'],
        size=(width, height),
        truth=np.array([i['bbox'] for i in instances], dtype=float).reshape(-1, 4),
        labels=np.array([i['bbox_label'] for i in instances], dtype=int),
        ignored=np.array([bool(i.get('ignore_flag')) for i in instances], dtype=bool),
        boxes=found.bboxes.cpu().double().numpy().reshape(-1, 4),
        found=found.labels.cpu().numpy().astype(int),
        scores=found.scores.cpu().double().numpy(),
    )

"""A run that keeps its frozen features: images in COCO's format, views of several sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from tests.builders import WORDS
from tests.faults.smallest import smallest
from tests.tool_run import write_data

NAMES = tuple(WORDS[:3])
META = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip', 'flip_direction')
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoiceResize', scales=[(48, 48), (64, 40)], keep_ratio=False),
    dict(type='PackDetInputs', meta_keys=(*META, 'text', 'custom_entities')),
]
HOOK = dict(type='FrozenFeaturesHook', views=2)


def images(folder: Path) -> str:
    """Writes two images.

    Args:
        folder: Their root.

    Returns:
        The same.
    """
    if not folder.exists():
        write_data(folder, NAMES, ('train',))
    return str(folder)


def config(work_dir: Path, text_dir: str, base: str, **settings: Any) -> Config:
    """Describes a run on two images, which lie beside its folder.

    Args:
        work_dir: Of the run.
        text_dir: Of the text model.
        base: Base checkpoint of the smallest model.
        **settings: ``frozen``, the hook or None; ``dataset``, keys of the data set to replace; and
            as for :func:`tests.run_small.config`.

    Returns:
        The config.
    """
    frozen, changed = settings.pop('frozen', HOOK), settings.pop('dataset', {})
    settings = {**dict(retain=None, by_epoch=True, epochs=3), **settings}
    cfg = smallest(str(work_dir), text_dir, base, **settings)
    dataset = dict(
        type='CocoDataset',
        data_root=images(work_dir.parent / 'images'),
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=NAMES),
        return_classes=True,
        pipeline=PIPELINE,
    )
    cfg.train_dataloader.dataset = {**dataset, **changed}
    if frozen:
        cfg.default_hooks.frozen_features = frozen
    return cfg


def run(*args: Any, **settings: Any) -> Runner:
    """Trains.

    Args:
        *args: As for :func:`config`.
        **settings: The same.

    Returns:
        The runner, after training.
    """
    runner = Runner.from_cfg(config(*args, **settings))
    runner.train()
    return runner


def train_as_rank(work_dir: str, text_dir: str, base: str) -> None:
    """Trains with gloo on two CPUs, for :func:`tests.processes.as_ranks`.

    Args:
        work_dir: As for :func:`config`.
        text_dir: The same.
        base: The same.
    """
    run(Path(work_dir), text_dir, base, epochs=3, batch_size=1, launcher='pytorch')

"""A run of mmengine's on random images, in this process or in one that is killed half way."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmdet.registry import DATASETS, HOOKS, METRICS
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import Dataset

import mmdet_gdino_lora  # noqa: F401
from tests.builders import WORDS, data_samples, detector_cfg

# mmengine's default, without a GPU's number.
ON_CPU = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)


@DATASETS.register_module(force=True)
class RandomImages(Dataset):
    """Noise with boxes; brightness drawn anew at every visit, as augmentation does.

    Args:
        flicker: One more than the largest brightness added; 1 keeps images as they are.
    """

    metainfo = dict(classes=tuple(WORDS[:4]))

    def __init__(self, flicker: int = 55) -> None:
        self.flicker = flicker

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = np.random.default_rng(index).integers(0, 200, (3, 48, 48))
        image = image + np.random.randint(0, self.flicker)  # noqa: NPY002 - as mmcv's transforms do
        sample = data_samples(WORDS[:4], [2], size=48, seed=index)[0]
        return dict(inputs=torch.from_numpy(image).to(torch.uint8), data_samples=sample)


@METRICS.register_module(force=True)
class GivenScores(BaseMetric):
    """Says what it is told, and beside it how sure the detector is, which its weights decide.

    Args:
        scores: Of one validation after the other.
    """

    def __init__(self, scores: Sequence[float]) -> None:
        super().__init__()
        self.scores = list(scores)

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        self.results += [float(s['pred_instances']['scores'].sum()) for s in data_samples]

    def compute_metrics(self, results: list) -> dict[str, float]:
        return dict(acc=self.scores.pop(0), sureness=sum(results))


@HOOKS.register_module(force=True)
class KilledHook(Hook):
    """Kills the process, without a chance to clean up, in the middle of an iteration."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if runner.iter == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def config(
    work_dir: str,
    text_dir: str,
    base: str,
    *,
    by_epoch: bool,
    epochs: int = 2,
    batch_size: int = 2,
    flicker: int = 55,
    load_from: bool = False,
    resume: bool = False,
    launcher: str = 'none',
    hooks: Sequence[dict] = (),
    checkpoint: Optional[dict] = None,
    scores: Sequence[float] = (),
    **model: Any,
) -> Config:
    """Describes 4 iterations of 2 images (2 epochs), with a checkpoint after every second one.

    Args:
        work_dir: Of the run.
        text_dir: Of the text model.
        base: Base checkpoint.
        by_epoch: Whether mmengine counts epochs or iterations.
        epochs: Number of epochs of 4 images.
        batch_size: Images of a rank's batch.
        flicker: Of the images.
        load_from: Whether mmengine's ``load_from`` brings the base, which mmdet's tools/train.py
            takes away where the run resumes.
        resume: Whether to go on from the latest checkpoint.
        launcher: 'pytorch' where a process group has been started.
        hooks: Further hooks.
        checkpoint: Further settings of the checkpoint hook.
        scores: Of the validations, one after every epoch; empty: nothing is validated.
        **model: Keys of the model config to replace.
    """
    if not load_from:
        model['base_checkpoint'] = base
    # runs of one name that begin in the same second would share a log
    begun = len(os.listdir(work_dir)) if os.path.isdir(work_dir) else 0
    hook = dict(type='AdapterCheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 2)
    cfg = dict(
        model=detector_cfg(text_dir, **model),
        work_dir=work_dir,
        train_dataloader=_loader(by_epoch, batch_size, flicker),
        train_cfg=_loop(by_epoch, epochs, batch_size),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=1e-3), clip_grad=dict(max_norm=0.1)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
        default_hooks=dict(
            checkpoint={**hook, **(checkpoint or {})}, logger=dict(type='LoggerHook', interval=1)
        ),
        custom_hooks=[dict(type='ResumableSeedHook'), *hooks],
        randomness=dict(seed=3),
        resume=resume,
        load_from=base if load_from and not resume else None,
        launcher=launcher,
        experiment_name=f'{work_dir}_{begun}',
        default_scope='mmdet',
        model_wrapper_cfg=ON_CPU if launcher != 'none' else None,
    )
    return Config({**cfg, **_validation(scores, batch_size)})


def run(*args: Any, **kwargs: Any) -> Runner:
    """Trains.

    Args:
        *args: As for :func:`config`.
        **kwargs: The same.

    Returns:
        The runner, after training.
    """
    runner = Runner.from_cfg(config(*args, **kwargs))
    runner.train()
    return runner


def logged(work_dir: Any) -> str:
    """Reads everything that runs have written into their logs.

    Args:
        work_dir: Of the runs.
    """
    return ''.join(path.read_text(encoding='utf-8') for path in Path(work_dir).rglob('*.log'))


def _loop(by_epoch: bool, epochs: int, batch_size: int) -> dict[str, Any]:
    if by_epoch:
        return dict(by_epoch=True, max_epochs=epochs, val_interval=1)
    return dict(by_epoch=False, max_iters=epochs * 4 // batch_size, val_interval=2)


def _validation(scores: Sequence[float], batch_size: int) -> dict[str, Any]:
    if not scores:
        return {}
    return dict(
        val_cfg=dict(),
        val_dataloader=_loader(True, batch_size, flicker=1),
        val_evaluator=dict(type='GivenScores', scores=list(scores)),
    )


def _loader(by_epoch: bool, batch_size: int, flicker: int) -> dict[str, Any]:
    return dict(
        batch_size=batch_size,
        num_workers=0,
        dataset=dict(type='RandomImages', flicker=flicker),
        sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler', shuffle=True),
        collate_fn=dict(type='pseudo_collate'),
    )


def run_until_killed(number: int, work_dir: str, text_dir: str, base: str, way: str) -> None:
    """Trains until its process is killed before the fourth iteration.

    Args:
        number: Of the process.
        work_dir: As for :func:`config`.
        text_dir: The same.
        base: The same.
        way: ``'epoch'`` or ``'iter'``, what mmengine counts.
    """
    run(work_dir, text_dir, base, by_epoch=way == 'epoch', hooks=[dict(type='KilledHook', at=3)])

"""Randomness that a resumed run shares with the run it continues."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from mmdet.registry import HOOKS
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop


@HOOKS.register_module()
class ResumableSeedHook(Hook):
    """Makes the random numbers of an iteration depend on seed, rank and iteration alone.

    mmengine's checkpoints don't hold the state of the random generators, so that a resumed run
    draws other denoising queries, dropout and augmentation than the run that was not stopped. With
    this hook both end with the same weights (on the CPU bit for bit), as long as augmentation runs
    in the main process or in workers that start anew each epoch (``persistent_workers=False``).

    Example::

        custom_hooks = [dict(type='ResumableSeedHook')]
        randomness = dict(seed=0)
    """

    priority = 'VERY_HIGH'

    def before_train_epoch(self, runner: Any) -> None:
        """Seeds what fetches the first batch.

        Args:
            runner: mmengine's runner.
        """
        self._seed(runner, runner.iter, fetching=True)
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            loop = runner.train_loop
            loop.dataloader_iterator = _Seeded(loop.dataloader_iterator, self, runner)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seeds the training step.

        Args:
            runner: mmengine's runner.
            batch_idx: Index in the epoch.
            data_batch: The batch.
        """
        self._seed(runner, runner.iter)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Seeds what fetches the next batch.

        Args:
            runner: mmengine's runner.
            batch_idx: Index in the epoch.
            data_batch: The batch.
            outputs: Of the model.
        """
        self._seed(runner, runner.iter + 1, fetching=True)

    def _seed(self, runner: Any, iteration: int, fetching: bool = False) -> None:
        entropy = (runner.seed, get_rank(), iteration, int(fetching))
        torch_seed, numpy_seed = np.random.SeedSequence(entropy).generate_state(2).tolist()
        torch.manual_seed(torch_seed)
        np.random.seed(numpy_seed)  # noqa: NPY002 - the generator that mmcv's transforms draw from
        random.seed(numpy_seed)


class _Seeded:
    """Seeds every fetch, those with which mmengine skips what a resumed run has seen included."""

    def __init__(self, iterator: Any, hook: ResumableSeedHook, runner: Any) -> None:
        self._iterator, self._hook, self._runner, self._fetched = iterator, hook, runner, 0

    def __next__(self) -> Any:
        self._hook._seed(self._runner, self._fetched, fetching=True)
        self._fetched += 1
        return next(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)

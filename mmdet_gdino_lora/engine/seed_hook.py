"""Randomness that a resumed run shares with the run it continues."""

from __future__ import annotations

from typing import Any, Optional

from mmdet.registry import HOOKS
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import DataLoader, IterableDataset

from mmdet_gdino_lora.engine.unreadable import UnreadableImages
from mmdet_gdino_lora.engine.visits import LateBatches, VisitedBatches, seed_by, visited_loader

SEEN = 'seen_batches'
"""In a checkpoint's meta: batches of the epoch that were trained on, and how many it has."""


@HOOKS.register_module()
class ResumableSeedHook(Hook):
    """Makes random numbers depend on seed, rank and moment alone, and resumes where a run stopped.

    mmengine's checkpoints don't hold the state of the random generators, so that a resumed run
    draws other denoising queries, dropout and augmentation than the run that was not stopped. With
    this hook both end with the same weights (on the CPU bit for bit), wherever augmentation runs:
    in the main process or in any number of workers, persistent or not (:mod:`~.engine.visits`). A
    checkpoint from the middle of an epoch goes on there; what was seen is not loaded again.

    An image that can no longer be read is told, and another takes its place.

    Example::

        custom_hooks = [dict(type='ResumableSeedHook')]
        randomness = dict(seed=0)

    Args:
        max_unreadable: Different images that may become unreadable during the run (on each rank)
            before it ends; 0 ends it at the first.
    """

    priority = 'VERY_HIGH'

    def __init__(self, max_unreadable: int = 20) -> None:
        self._attempts = max_unreadable
        self._unreadable = UnreadableImages(max_unreadable)
        self._batches: Optional[VisitedBatches] = None
        self._resumed: Optional[tuple[int, int]] = None
        self._seen = 0

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Reads how far into its epoch a checkpoint is.

        Args:
            runner: mmengine's runner.
            checkpoint: What is being loaded.
        """
        self._resumed = checkpoint.get('meta', {}).get(SEEN)

    def before_train(self, runner: Any) -> None:
        """Builds the training loader anew, so that samples know their visit.

        Args:
            runner: mmengine's runner.
        """
        loop, loader = runner.train_loop, runner.train_loop.dataloader
        if not _can_be_built_anew(loader):
            return
        endless = isinstance(loop, IterBasedTrainLoop)
        by_rank = (runner.cfg.get('randomness') or {}).get('diff_rank_seed', False)
        loop.dataloader = visited_loader(
            loader,
            runner.cfg.get('train_dataloader') or {},
            entropy=(runner.seed, get_rank()),
            sampler_seed=None if by_rank else runner.seed,
            endless=endless,
            attempts=self._attempts,
        )
        self._batches = loop.dataloader.batch_sampler
        if endless:
            self._batches.skip = runner.iter
            # The loop's own iterator may have workers that load already; with it they go.
            loop.dataloader_iterator = LateBatches(loop.dataloader, runner.iter)
        elif self._resumed and runner.iter:
            self._seen = self._left_to_skip(*self._resumed)

    def before_train_epoch(self, runner: Any) -> None:
        """Seeds what draws the order, and tells the loader the epoch.

        Args:
            runner: mmengine's runner.
        """
        self._seed(runner, runner.epoch, 3)
        if self._batches is not None and not isinstance(runner.train_loop, IterBasedTrainLoop):
            self._batches.epoch, self._batches.skip = runner.epoch, self._seen

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seeds the training step, and looks for images that others stand in for.

        Args:
            runner: mmengine's runner.
            batch_idx: Index in the epoch.
            data_batch: The batch.
        """
        self._unreadable.look(data_batch)
        self._seed(runner, runner.iter, 0)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """Seeds what comes between two steps.

        Args:
            runner: mmengine's runner.
            batch_idx: Index in the epoch.
            data_batch: The batch.
            outputs: Of the model.
        """
        self._seen += 1
        self._seed(runner, runner.iter + 1, 1)

    def after_train_epoch(self, runner: Any) -> None:
        """Begins to count the batches of an epoch anew.

        Args:
            runner: mmengine's runner.
        """
        self._seen = 0

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Writes down how far into its epoch the run is.

        Args:
            runner: mmengine's runner.
            checkpoint: About to be written.
        """
        meta = checkpoint['meta']
        if not isinstance(runner.train_loop, IterBasedTrainLoop) and meta['epoch'] == runner.epoch:
            meta[SEEN] = (self._seen, len(runner.train_dataloader))

    def _left_to_skip(self, seen: int, batches: int) -> int:
        if batches == len(self._batches or ()):
            return seen
        MMLogger.get_current_instance().warning(
            'the checkpoint is from batch %d of an epoch of %d batches, which now has %d: the '
            'epoch begins anew.',
            seen,
            batches,
            len(self._batches or ()),
        )
        return 0

    @staticmethod
    def _seed(runner: Any, moment: int, purpose: int) -> None:
        seed_by(runner.seed, get_rank(), moment, purpose)


def _can_be_built_anew(loader: Any) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and hasattr(loader.batch_sampler, 'sampler')
        and not isinstance(loader.batch_sampler, VisitedBatches)
    )

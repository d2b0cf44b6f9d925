"""Samples that know when they are visited: randomness by visit, whoever loads them, and resuming.

A training loader is built anew around the same data set. Its batch sampler hands out, in place of
an index, a :class:`Visit`: the index with the epoch and the place in the sampler's stream. The data
set seeds the random generators with it before the sample is made, so that augmentation is the same
in the main process, in one worker or in eight, in workers that live on or start anew, and after
resuming. What a resumed run has seen is counted off in the sampler, and no image of it is loaded.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from mmengine.registry import DATA_SAMPLERS
from torch.utils.data import BatchSampler, DataLoader, Dataset

from mmdet_gdino_lora.engine.unreadable import readable_sample

LOADER_OPTIONS = (
    'num_workers',
    'collate_fn',
    'pin_memory',
    'pin_memory_device',
    'timeout',
    'worker_init_fn',
    'multiprocessing_context',
    'generator',
    'prefetch_factor',
    'persistent_workers',
    'in_order',
)
"""What a loader that is built anew keeps of the one before, as far as this torch has it."""


def seed_by(*entropy: int) -> None:
    """Seeds python's, numpy's and torch's generators.

    Args:
        *entropy: What the random numbers shall depend on.
    """
    torch_seed, numpy_seed = np.random.SeedSequence(entropy).generate_state(2).tolist()
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)  # noqa: NPY002 - the generator that mmcv's transforms draw from
    random.seed(numpy_seed)


@contextmanager
def same_numbers_drawn(devices: Sequence[int] = ()) -> Iterator[None]:
    """Leaves the random generators of python, numpy and torch as they were.

    Args:
        devices: Of CUDA, whose generators are left so, too.

    Yields:
        Nothing.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - as above
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002 - as above


class Visit(NamedTuple):
    """An index into a data set, and when in the run it is asked for.

    Attributes:
        index: Whatever the sampler yields.
        epoch: Number of the pass through the sampler.
        position: Place in that pass, counted in samples of this rank.
    """

    index: Any
    epoch: int
    position: int


class VisitedDataset(Dataset):
    """A data set whose samples' randomness depends on the visit alone; else the data set itself.

    Attributes, metainfo and pipeline among them, are read from the data set within, and written to
    it, as hooks that switch pipelines do.

    Args:
        dataset: The data set within.
        entropy: The run's seed and the rank.
        attempts: Most images of one visit that may be unreadable.
    """

    def __init__(self, dataset: Any, entropy: tuple[int, int], attempts: int) -> None:
        object.__setattr__(self, 'visited', (dataset, entropy, attempts))

    def __len__(self) -> int:
        return len(self.visited[0])

    def __getitem__(self, visit: Any) -> Any:
        dataset, entropy, attempts = self.visited
        if not isinstance(visit, Visit):
            return dataset[visit]
        seed_by(*entropy, visit.epoch, visit.position, 2)
        return readable_sample(dataset, visit.index, attempts)

    def __getattr__(self, name: str) -> Any:
        # Not torch's `__getitems__`, which would pass this class by; not pickle's questions either.
        if name == 'visited' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.visited[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.visited[0], name, value)

    def __getstate__(self) -> tuple:
        return self.visited

    def __setstate__(self, state: tuple) -> None:
        object.__setattr__(self, 'visited', state)


class VisitedBatches:
    """A batch sampler that yields visits.

    Attributes:
        sampler: Where mmengine's ``DistSamplerSeedHook`` sets the epoch.
        epoch: Of the next pass; told from outside where passes end.
        skip: Batches that the next pass leaves out, without anybody loading them.

    Args:
        batches: The batch sampler within.
        endless: Whether a pass goes over into the next one, for loops that count iterations.
    """

    def __init__(self, batches: Any, endless: bool) -> None:
        self._batches, self._endless = batches, endless
        self.sampler = batches.sampler
        self.batch_size = getattr(batches, 'batch_size', None)
        self.drop_last = getattr(batches, 'drop_last', False)
        self.epoch, self.skip = 0, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Visit]]:
        epoch, skip, self.skip = self.epoch, self.skip, 0
        while True:
            position = 0
            for indices in self._batches:
                first, position = position, position + len(indices)
                if skip:
                    skip -= 1
                    continue
                yield [Visit(index, epoch, first + i) for i, index in enumerate(indices)]
            if not (self._endless and position):
                return
            epoch += 1
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)


class LateBatches:
    """The batches of a loop that counts iterations; the loader starts with the first that is used.

    Args:
        loader: Over an endless :class:`VisitedBatches`, which leaves out the first ``skipped``.
        skipped: Batches that mmengine's loop fetches to throw them away; nothing is loaded for it.
    """

    def __init__(self, loader: DataLoader, skipped: int) -> None:
        self._loader, self._skipped = loader, skipped
        self._iterator: Optional[Iterator] = None

    def __iter__(self) -> LateBatches:
        return self

    def __next__(self) -> Any:
        if self._skipped:
            self._skipped -= 1
            return None
        if self._iterator is None:
            self._iterator = iter(self._loader)
        return next(self._iterator)

    def skip_iter(self, num_iters: int) -> None:
        """Skips as OneDL's mmengine asks for it, in one call where OpenMMLab's fetches.

        Args:
            num_iters: Of the batches that the sampler leaves out already.
        """
        self._skipped -= num_iters


def visited_loader(
    loader: DataLoader,
    settings: Mapping[str, Any],
    *,
    entropy: tuple[int, int],
    sampler_seed: Optional[int],
    endless: bool,
    attempts: int,
) -> DataLoader:
    """Builds a training loader anew, over the same data set, so that samples know their visit.

    Args:
        loader: As mmengine has built it; a loop may have drawn from its sampler already.
        settings: The config of the loader; samplers that are described there are built anew.
        entropy: The run's seed and the rank.
        sampler_seed: Of the sampler.
        endless: As for :class:`VisitedBatches`.
        attempts: As for :class:`VisitedDataset`.

    Returns:
        The loader.
    """
    batches = VisitedBatches(_fresh_batches(loader, settings, sampler_seed), endless)
    options = {name: getattr(loader, name) for name in LOADER_OPTIONS if hasattr(loader, name)}
    dataset = VisitedDataset(loader.dataset, entropy, attempts)
    return DataLoader(dataset, batch_sampler=batches, **options)


def _fresh_batches(loader: DataLoader, settings: Mapping[str, Any], seed: Optional[int]) -> Any:
    given: Any = loader.batch_sampler
    sampler = given.sampler
    described = settings.get('sampler')
    if isinstance(described, Mapping):
        defaults = dict(dataset=loader.dataset, seed=seed)
        sampler = DATA_SAMPLERS.build(dict(described), default_args=defaults)
    described = settings.get('batch_sampler')
    if isinstance(described, Mapping):
        defaults = dict(sampler=sampler, batch_size=settings['batch_size'])
        return DATA_SAMPLERS.build(dict(described), default_args=defaults)
    if sampler is given.sampler:
        return given
    return BatchSampler(sampler, given.batch_size, given.drop_last)

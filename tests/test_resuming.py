"""Runs that are stopped anywhere and go on: the same bits, whoever loads the samples."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch.utils.data import DataLoader

from mmdet_gdino_lora.engine.visits import LateBatches, same_numbers_drawn, seed_by
from tests.faults.smallest import smallest
from tests.run_small import logged

EPOCHS = 3


@HOOKS.register_module(force=True)
class SignalledHook(Hook):
    """Sends a signal to its own process, in the middle of an iteration."""

    def __init__(self, at: int, number: int = signal.SIGTERM) -> None:
        self.at, self.number = at, number

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if runner.iter == self.at:
            os.kill(os.getpid(), self.number)


@HOOKS.register_module(force=True)
class SeenBatchesHook(Hook):
    """Remembers the pixels of every batch."""

    def __init__(self) -> None:
        self.seen: dict[int, list[float]] = {}

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self.seen[runner.iter] = [float(image.float().sum()) for image in data_batch['inputs']]


def train(work_dir: Path, text_dir: str, small_base: str, loader: dict, **settings: Any) -> Runner:
    """Three epochs of two iterations."""
    hooks = [dict(type='PreemptHook'), dict(type='SeenBatchesHook'), *settings.pop('hooks', ())]
    settings = dict(epochs=EPOCHS, hooks=hooks, **settings)
    cfg = smallest(str(work_dir), text_dir, small_base, **settings)
    cfg.train_dataloader.update(loader)
    runner = Runner.from_cfg(cfg)
    try:
        runner.train()
    except SystemExit as end:
        assert end.code == 143
    return runner


def seen(runner: Runner) -> dict[int, list[float]]:
    return next(hook.seen for hook in runner.hooks if isinstance(hook, SeenBatchesHook))


def differing(one: Runner, other: Runner) -> list[str]:
    weights, others = one.model.state_dict(), other.model.state_dict()
    return [name for name in weights if not torch.equal(weights[name], others[name])]


WORKERS = dict(num_workers=2, persistent_workers=True)


@pytest.fixture(scope='module', params=['epoch', 'iter'])
def whole(
    request: pytest.FixtureRequest,
    text_dir: str,
    small_base: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[bool, Runner]:
    """A run without workers that nothing stops."""
    by_epoch = request.param == 'epoch'
    work_dir = tmp_path_factory.mktemp('whole')
    return by_epoch, train(work_dir, text_dir, small_base, {}, by_epoch=by_epoch)


def test_persistent_workers_make_the_samples_of_the_main_process(
    text_dir: str, small_base: str, tmp_path: Path, whole: tuple[bool, Runner]
) -> None:
    by_epoch, run = whole
    other = train(tmp_path, text_dir, small_base, WORKERS, by_epoch=by_epoch)
    assert seen(other) == seen(run) and len(seen(run)) == 2 * EPOCHS
    assert len({tuple(batch) for batch in seen(run).values()}) == 2 * EPOCHS
    assert differing(run, other) == []


@pytest.mark.parametrize('at', [2, 3])
def test_after_sigterm_a_run_goes_on_to_the_bit_also_within_an_epoch(
    text_dir: str, small_base: str, tmp_path: Path, whole: tuple[bool, Runner], at: int
) -> None:
    by_epoch, run = whole
    loader = WORKERS if at == 2 else {}
    stopped = train(
        tmp_path,
        text_dir,
        small_base,
        loader,
        by_epoch=by_epoch,
        hooks=[dict(type='SignalledHook', at=at)],
    )
    assert max(seen(stopped)) == at  # the iteration came to its end, and no other began
    assert Path(tmp_path, 'last_checkpoint').read_text().endswith('/preempted.pth')
    resumed = train(tmp_path, text_dir, small_base, loader, by_epoch=by_epoch, resume=True)
    assert {**seen(stopped), **seen(resumed)} == seen(run)
    assert min(seen(resumed)) == at + 1
    assert differing(run, resumed) == []
    assert resumed.epoch == run.epoch and resumed.iter == run.iter
    assert not [name for name in os.listdir(tmp_path) if 'preempted' in name or 'partial' in name]


def test_signals_of_others_leave_a_worker_alone_and_its_own_process_ends_it(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    by_all = dict(type='AllSignalledHook', at=1)
    stopped = train(tmp_path, text_dir, small_base, WORKERS, by_epoch=True, hooks=[by_all])
    assert max(seen(stopped)) == 1
    assert Path(tmp_path, 'last_checkpoint').read_text().endswith('/preempted.pth')


@HOOKS.register_module(force=True)
class AllSignalledHook(SignalledHook):
    """Signals as a scheduler does: every process of the job, by a process that is none of them."""

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if runner.iter == self.at:
            workers = runner.train_dataloader._iterator._workers
            numbers = ' '.join(str(number) for number in (*(w.pid for w in workers), os.getpid()))
            assert os.system(f'kill -TERM {numbers}') == 0
            assert all(worker.is_alive() for worker in workers)


def test_nothing_that_was_seen_is_loaded_again(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    settings = dict(by_epoch=True)
    hooks = [dict(type='SignalledHook', at=2)]
    train(tmp_path, text_dir, small_base, {}, hooks=hooks, **settings)
    counted: list[int] = []
    cfg = smallest(str(tmp_path), text_dir, small_base, epochs=EPOCHS, resume=True, **settings)
    runner = Runner.from_cfg(cfg)
    dataset = runner.train_dataloader.dataset
    made = type(dataset).__getitem__
    type(dataset).__getitem__ = lambda self, index: counted.append(index) or made(self, index)
    try:
        runner.train()
    finally:
        type(dataset).__getitem__ = made
    assert len(counted) == 4 * EPOCHS - 3 * 2


def test_another_batch_size_begins_the_epoch_anew_and_says_so(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    hooks = [dict(type='SignalledHook', at=2)]
    train(tmp_path, text_dir, small_base, {}, by_epoch=True, hooks=hooks)
    resumed = train(tmp_path, text_dir, small_base, dict(batch_size=1), by_epoch=True, resume=True)
    assert 'from batch 1 of an epoch of 2 batches, which now has 4' in logged(tmp_path)
    assert resumed.epoch == EPOCHS


@pytest.mark.parametrize('in_one_call', [False, True])
def test_what_a_resumed_loop_throws_away_is_not_loaded(in_one_call: bool) -> None:
    """OpenMMLab's loop fetches the batches that were seen, OneDL's has them skipped."""
    loaded = []
    samples = [torch.tensor(float(i)) for i in range(5)]
    loader = DataLoader(samples, batch_size=1, collate_fn=lambda batch: loaded.extend(batch))
    batches = LateBatches(loader, skipped=3)
    if in_one_call:
        batches.skip_iter(3)
    else:
        assert [next(batches) for _ in range(3)] == [None, None, None]
    assert loaded == []
    next(batches)
    assert loaded == [samples[0]]


def test_whoever_draws_within_leaves_the_generators_as_they_were() -> None:
    def drawn() -> tuple[float, ...]:
        return random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002

    seed_by(1)
    wanted = drawn()
    seed_by(1)
    with pytest.raises(KeyError), same_numbers_drawn():
        seed_by(2)
        drawn()
        raise KeyError
    assert drawn() == wanted

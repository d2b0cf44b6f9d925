"""What strikes a run from outside: told in one sentence, with what was kept."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import HOOKS
from mmengine.runner import Runner
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset

from mmdet_gdino_lora.engine.endings import ending
from mmdet_gdino_lora.engine.files import DiskFullError
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.read import read_file
from tests.faults.injected import FaultHook
from tests.faults.smallest import smallest
from tests.processes import as_ranks
from tests.run_small import logged


def train(work_dir: Path, text_dir: str, base: str, *hooks: dict, **settings: Any) -> Runner:
    dataset, seed = settings.pop('dataset', None), settings.pop('seed', {})
    settings = dict(by_epoch=True, retain=None, hooks=hooks, **settings)
    cfg = smallest(str(work_dir), text_dir, base, **settings)
    cfg.custom_hooks[0].update(seed)
    if dataset:
        cfg.train_dataloader.dataset = dataset
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Larger ones can't be written by this process, and the system says so."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ------------------------------------------------------------------------------------ unreadable


def test_an_image_that_goes_bad_is_told_once_and_others_take_its_place(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    dataset = dict(type='FileImages', folder=str(tmp_path / 'images'), text_dir=text_dir)
    bad = dict(type='FaultHook', what='images_go_bad', at=0)
    runner = train(tmp_path, text_dir, small_base, bad, dataset=dataset)
    said = logged(tmp_path)
    for number, name in ((1, '0.png'), (2, '1.png')):
        assert said.count(f'/{name} can no longer be read; another image takes its place') == 1
        assert f'({number} of at most 20 such images' in said
    assert runner.iter == 4


def test_more_bad_images_than_allowed_end_the_run_and_are_named(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    dataset = dict(type='FileImages', folder=str(tmp_path / 'images'), text_dir=text_dir)
    bad = dict(type='FaultHook', what='images_go_bad', at=0)
    with pytest.raises(ConfigError) as error:
        train(tmp_path, text_dir, small_base, bad, dataset=dataset, seed=dict(max_unreadable=1))
    assert '2 with max_unreadable=1' in str(error.value)
    assert '/0.png' in str(error.value) and '/1.png' in str(error.value)


def test_what_is_not_about_an_image_stays_an_error(
    text_dir: str, small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.faults.injected import FileImages

    def broken(self: Any, index: int) -> dict:
        raise AttributeError('a mistake in a transform')

    monkeypatch.setattr(FileImages, '__getitem__', broken)
    dataset = dict(type='FileImages', folder=str(tmp_path / 'images'), text_dir=text_dir)
    with pytest.raises(AttributeError, match='a mistake in a transform'):
        train(tmp_path, text_dir, small_base, dataset=dataset)


# ----------------------------------------------------------------------------------- on the disk


@HOOKS.register_module(force=True)
class SmallFilesHook(FaultHook):
    """From an iteration on, files can't become large."""

    def files_stay_small(self, runner: Runner) -> None:
        self.limit = files_no_larger_than(1_000_000)
        self.limit.__enter__()


def test_a_checkpoint_that_can_not_be_written_ends_the_run_and_leaves_the_last_one_whole(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    small = dict(type='SmallFilesHook', what='files_stay_small', at=2)
    try:
        with pytest.raises(DiskFullError) as error:
            train(tmp_path, text_dir, small_base, small)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = str(error.value)
    assert f'{tmp_path}/epoch_2.pth could not be written (File too large)' in said
    assert f'{tmp_path}/epoch_1.pth and what was saved before it are whole' in said
    assert 'free space' in said and said.endswith('go on with --resume')
    assert not [p for p in tmp_path.rglob('*') if p.name.endswith('.partial')]
    assert not (tmp_path / 'epoch_2.pth').exists()
    assert (tmp_path / 'last_checkpoint').read_text() == f'{tmp_path}/epoch_1.pth'
    assert read_file(f'{tmp_path}/epoch_1.pth')['meta']['epoch'] == 1


def test_resuming_mends_what_a_killed_run_has_left(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    train(tmp_path, text_dir, small_base, epochs=1)
    adapter = tmp_path / 'epoch_1_adapter/adapter_model.safetensors'
    written = load_file(adapter)
    adapter.unlink()
    for folder in (tmp_path, adapter.parent):
        (folder / '.epoch_2.pth.17.partial').write_bytes(b'half')
    train(tmp_path, text_dir, small_base, epochs=2, resume=True)
    again = load_file(adapter)
    assert again.keys() == written.keys() and written
    assert all(torch.equal(again[name], tensor) for name, tensor in written.items())
    assert not [p for p in tmp_path.rglob('*') if p.name.endswith('.partial')]


# ------------------------------------------------------------------------------------- processes


class Mistaken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise ConfigError('classes are too many for a caption: 1500')


class Dying(Mistaken):
    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), 9)
        return 0


def test_a_workers_mistake_and_its_death_are_one_sentence_each() -> None:
    with pytest.raises(ConfigError) as mistake:
        list(DataLoader(Mistaken(), num_workers=1))
    assert ending(mistake.value) == 'classes are too many for a caption: 1500'
    with pytest.raises(RuntimeError) as death:
        list(DataLoader(Dying(), num_workers=1))
    said = ending(death.value)
    assert said is not None and '--resume' in said and 'num_workers' in said
    assert said.startswith('a worker of a data loader (process ') and ' is gone: it ' in said
    full = OSError(errno.ENOSPC, 'No space left on device', 'scalars.json')
    assert 'is full (scalars.json): free space' in str(ending(full))
    assert ending(OSError(errno.ENOENT, 'No such file')) is None
    assert ending(RuntimeError('mat1 and mat2 shapes cannot be multiplied')) is None
    assert ending(RuntimeError('Connection closed by peer')) is None  # no ranks here


def rank_that_loses_the_other(work_dir: str, gone: int) -> None:
    """One rank ends without a word; the other leaves what it says of that."""
    try:
        torch.distributed.barrier()  # who goes before the other has connected is lost at the start
        if torch.distributed.get_rank() == gone:
            os._exit(0)
        torch.distributed.all_reduce(torch.ones(1))
    except RuntimeError as error:
        Path(work_dir, 'said').write_text(str(ending(error)))


@pytest.mark.parametrize('gone', [0, 1])
def test_who_is_left_names_the_rank_that_is_gone(tmp_path: Path, gone: int) -> None:
    as_ranks(rank_that_loses_the_other, str(tmp_path), gone)
    said = (tmp_path / 'said').read_text()
    assert f'rank {1 - gone} of 2 lost rank {gone},' in said and '--resume' in said


def in_ranks(work_dir: str, text_dir: str, base: str, hooks: list[dict]) -> None:
    """One rank's run; it leaves how it ended, after how many iterations, and its weights."""
    rank = torch.distributed.get_rank()
    cfg = smallest(
        work_dir,
        text_dir,
        base,
        by_epoch=True,
        epochs=4,
        batch_size=1,
        launcher='pytorch',
        hooks=[hook for hook in hooks if hook.pop('only', rank) == rank],
    )
    runner = Runner.from_cfg(cfg)
    try:
        runner.train()
        end = 'ended'
    except (SystemExit, ConfigError) as error:
        end = str(error)
    weights = {name: w.clone() for name, w in runner.model.module.state_dict().items()}
    torch.save(dict(end=end, iter=runner.iter, weights=weights), f'{work_dir}/{rank}.pth')


def ends(tmp_path: Path, text_dir: str, base: str, *hooks: dict) -> list[dict]:
    as_ranks(in_ranks, str(tmp_path), text_dir, base, list(hooks))
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    for name, weight in first['weights'].items():
        assert torch.equal(weight, second['weights'][name]), name
    return [first, second]


def test_a_signal_to_one_rank_stops_both_at_the_same_iteration(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    signal = dict(type='FaultHook', what='sigterm', at=1, only=1)
    first, second = ends(tmp_path, text_dir, small_base, dict(type='PreemptHook'), signal)
    assert first['end'] == second['end'] == '143'
    assert first['iter'] == second['iter'] == 2  # one after the signal
    assert (tmp_path / 'last_checkpoint').read_text().endswith('preempted.pth')


@pytest.mark.parametrize('action', ['skip', 'stop'])
def test_nan_on_one_rank_is_left_out_or_ends_the_run_on_both(
    text_dir: str, small_base: str, tmp_path: Path, action: str
) -> None:
    watch = dict(type='NonFiniteHook', on_nonfinite=action)
    nan = dict(type='NaNHook', where='forward', at=[3], only=1)
    first, second = ends(tmp_path, text_dir, small_base, watch, nan)
    assert (tmp_path / 'nonfinite_iter_4_rank_1.pth').is_file()
    if action == 'skip':
        assert first['end'] == second['end'] == 'ended'
    else:
        assert 'gradients (of some rank)' in first['end'] and 'decoder layer 1' in second['end']
        assert first['iter'] == second['iter'] == 4
    assert all(torch.isfinite(w).all() for w in first['weights'].values())

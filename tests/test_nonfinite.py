"""NaN in a training step: named, kept for a replay, and nothing learns from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import HOOKS
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner

from mmdet_gdino_lora.engine.replay import Replay
from mmdet_gdino_lora.errors import ConfigError
from tests.faults.injected import NAN_PLACES
from tests.faults.smallest import smallest
from tests.run_small import logged
from tests.tool_run import ROOT, run_tool


@HOOKS.register_module(force=True)
class StatesHook(Hook):
    """Notes what every step left behind."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.states.append(state(runner))


def state(runner: Runner) -> dict[str, torch.Tensor]:
    """Everything that a step may touch: weights, the optimizer's state, averages."""
    found = {f'model.{n}': v for n, v in runner.model.state_dict().items()}
    for number, of_one in runner.optim_wrapper.optimizer.state_dict()['state'].items():
        found.update({f'optimizer.{number}.{n}': torch.as_tensor(v) for n, v in of_one.items()})
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            found.update({f'average.{n}': v for n, v in hook.ema_model.state_dict().items()})
    return {name: value.detach().clone() for name, value in found.items()}


def train(work_dir: Path, text_dir: str, base: str, where: str, at: list[int], **hook: Any):
    """Six iterations; returns the runner, or the error, and the states after the steps."""
    amp = hook.pop('amp', None)
    nan, states = dict(type='NaNHook', where=where, at=at), dict(type='StatesHook')
    cfg = smallest(
        str(work_dir),
        text_dir,
        base,
        by_epoch=False,
        epochs=3,
        hooks=[dict(type='NonFiniteHook', **hook), dict(type='EMAHook'), nan, states],
        checkpoint=dict(interval=100, save_last=False),
    )
    if amp:
        cfg.optim_wrapper.update(amp)
        cfg.custom_hooks.append(dict(type='LossScaleHook'))
    runner = Runner.from_cfg(cfg)
    error = None
    try:
        runner.train()
    except ConfigError as raised:
        error = str(raised)
    states = next(hook.states for hook in runner.hooks if isinstance(hook, StatesHook))
    return runner, error, states


def changed(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> set[str]:
    assert one.keys() == other.keys()
    return {n.split('.')[0] for n in one if not torch.equal(one[n], other[n])}


NAMED = dict(
    forward='pred_logits of decoder layer 1',
    loss='loss components loss_giou_0',
    gradient='gradients are',
    cost='matching costs of layer 0',
)


@pytest.mark.parametrize('where', NAN_PLACES)
def test_a_skipped_batch_touches_nothing_and_the_run_goes_on(
    text_dir: str,
    small_base: str,
    tmp_path: Path,
    where: str,
) -> None:
    runner, error, states = train(
        tmp_path, text_dir, small_base, where, [2, 3], on_nonfinite='skip'
    )
    assert error is None and len(states) == 6
    everything = {'model', 'optimizer', 'average'}
    moved = [changed(a, b) for a, b in zip(states, states[1:])]
    assert moved == [everything, set(), set(), everything, everything]
    said = logged(tmp_path)
    assert NAMED[where] in said and '2 in a row, at most 5' in said
    losses = runner.message_hub.log_scalars['train/loss'].data[0]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


@pytest.mark.parametrize('where', ['forward', 'gradient'])
def test_the_run_ends_with_a_sentence_and_a_replay_that_shows_the_place(
    text_dir: str,
    small_base: str,
    tmp_path: Path,
    where: str,
    capsys: pytest.CaptureFixture,
) -> None:
    runner, error, states = train(tmp_path, text_dir, small_base, where, [2])
    assert error is not None and len(states) == 2
    assert changed(states[1], state(runner)) == set()
    assert error.startswith('iteration 3: ') and NAMED[where] in error and '.jpg' in error
    file = tmp_path / 'nonfinite_iter_3.pth'
    assert f'tools/replay.py CONFIG {file}' in error and '(0.0007 now)' in error

    kept = Replay.read(str(file))
    assert kept.moment == dict(seed=3, rank=0, iteration=2)
    for name, value in runner.model.state_dict().items():
        assert torch.equal(kept.weights[name], value)
    path = str(tmp_path / 'config.py')
    runner.cfg.dump(path)
    capsys.readouterr()
    run_tool(f'python tools/replay.py {path} {file}', ROOT)
    said = capsys.readouterr().out
    # The planted NaN is gone with the process that planted it: the same step is finite now.
    assert "every module's output is finite" in said and 'NaN or infinite: none' in said


def test_a_replay_finds_the_first_module_and_the_components(
    text_dir: str, small_base: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    runner, _, _ = train(tmp_path, text_dir, small_base, 'forward', [2])
    file = str(tmp_path / 'nonfinite_iter_3.pth')
    replay = Replay.read(file)
    name = next(n for n in replay.weights if 'decoder.layers.1.ffn' in n and 'lora_B' in n)
    replay.weights[name].fill_(math.nan)
    replay.write(file)
    path = str(tmp_path / 'config.py')
    runner.cfg.dump(path)
    run_tool(f'python tools/replay.py {path} {file}', ROOT)
    said = capsys.readouterr().out
    assert 'decoder.layers.1.ffn' in said.split('first module whose output')[1]
    assert 'loss_ce' in said and 'nan' in said and 'found: pred_logits of decoder layer 1' in said


def test_as_many_in_a_row_as_allowed_end_the_run(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    settings = dict(on_nonfinite='skip', max_skips=2)
    _, error, states = train(tmp_path, text_dir, small_base, 'loss', [1, 2, 3, 4], **settings)
    assert error is not None and '(3 in a row)' in error and len(states) == 3
    _, error, states = train(tmp_path / '2', text_dir, small_base, 'loss', [0, 1, 3, 4], **settings)
    assert error is None and len(states) == 6


def test_skipping_needs_the_norm_of_the_gradients(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    cfg = smallest(
        str(tmp_path),
        text_dir,
        small_base,
        by_epoch=False,
        hooks=[dict(type='NonFiniteHook', on_nonfinite='skip')],
    )
    cfg.optim_wrapper.pop('clip_grad')
    with pytest.raises(ConfigError, match='optim_wrapper.clip_grad'):
        Runner.from_cfg(cfg).train()


@HOOKS.register_module(force=True)
class LossScaleHook(Hook):
    """Gives the run a loss scale that is too large at first; mmengine's own needs a GPU."""

    def before_train(self, runner: Runner) -> None:
        scaler = torch.amp.GradScaler('cpu', init_scale=2.0**127, backoff_factor=2.0**-60)
        runner.optim_wrapper.loss_scaler = scaler


def test_a_loss_scale_that_is_found_is_no_fault_and_nan_under_it_is(
    text_dir: str, small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True
    )
    monkeypatch.setattr('mmdet_gdino_lora.engine.unfit.get_device', lambda: 'cuda')
    amp = dict(type='AmpOptimWrapper', dtype='bfloat16')
    settings = dict(on_nonfinite='skip', amp=amp)
    _, error, states = train(tmp_path, text_dir, small_base, 'forward', [3], **settings)
    assert error is None and len(states) == 6
    assert not any(name.startswith('optimizer') for name in states[0])  # left out by the scaler
    moved = [changed(a, b) for a, b in zip(states[1:], states[2:])]
    assert moved[1] == set() and moved[0] == moved[2] == {'model', 'optimizer', 'average'}
    said = logged(tmp_path)
    assert 'iteration 4: ' in said and said.count('the batch is left out') == 1

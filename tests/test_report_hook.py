"""The report at the end of a run: what it leaves on disk, and that it leaves the run as it was."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import HOOKS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdet_gdino_lora.lora import ADAPTER, lora_state
from mmdet_gdino_lora.report.hook import ReportHook
from tests.run_small import logged, run
from tests.tool_run import Things, inside, run_typed

WARNED = re.compile(r' WARNING - .*report.*')


def state(detector: Any) -> dict[str, Any]:
    """All that a report may not change."""
    numpy = np.random.get_state()  # noqa: NPY002 - what mmcv's transforms draw from
    return dict(
        weights={name: tensor.clone() for name, tensor in detector.state_dict().items()},
        modes=[module.training for module in detector.modules()],
        taught=lora_state(detector).taught(ADAPTER),
        drawn=(torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2]),
    )


@HOOKS.register_module(force=True)
class StateHook(Hook):
    """Remembers the state that it finds at the end of a run."""

    priority = 'LOWEST'

    def __init__(self, training: bool = False) -> None:
        self.training = training
        self.found: dict[str, Any] = {}

    def after_train(self, runner: Runner) -> None:
        if self.training:  # after the last validation nothing is
            runner.model.train()
        self.found = state(runner.model)


@HOOKS.register_module(force=True)
class TermHook(Hook):
    """Sends SIGTERM to its own process in the middle of an iteration."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        if runner.iter == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


def trained(things: Things, work_dir: str, hooks: Sequence[dict], **settings: Any) -> Runner:
    """Runs the README's config with hooks, and settings of it replaced."""
    with inside(things.folder):
        cfg = Config.fromfile('my_things.py')
        cfg.merge_from_dict({'custom_hooks': list(hooks), 'work_dir': work_dir, **settings})
        runner = Runner.from_cfg(cfg)
        runner.train()
    return runner


def assert_same_state(runner: Runner) -> dict[str, Any]:
    """The state before the report is the one behind it; returns it."""
    before, after = (hook.found for hook in runner.hooks if isinstance(hook, StateHook))
    assert before['weights'].keys() == after['weights'].keys()
    for name, tensor in before['weights'].items():
        assert torch.equal(tensor, after['weights'][name]), name
    for part in ('modes', 'taught', 'drawn'):
        assert before[part] == after[part], part
    return before


def words(page: Path) -> str:
    """A page, but for when it was written."""
    return re.sub(r'\d{4}-\d\d-\d\d \d\d:\d\d', '', page.read_text(encoding='utf-8'))


REPORT = [dict(type='StateHook', training=True), dict(type='ReportHook'), dict(type='StateHook')]


def test_a_run_ends_with_the_report_of_its_best_weights(things: Things) -> None:
    runner = trained(
        things,
        './reported/run',
        [dict(type='EMAHook'), *REPORT],
        **{'train_cfg.max_epochs': 2, 'default_hooks.checkpoint.save_best': 'coco/bbox_mAP'},
    )
    folder = things.folder / 'reported/run'
    # On noise nothing is ever better than the first.
    assert (folder / 'best_coco_bbox_mAP_epoch_1.pth').is_file()
    before = assert_same_state(runner)
    best = torch.load(folder / 'best_coco_bbox_mAP_epoch_1.pth', weights_only=False)['state_dict']
    assert any(not torch.equal(tensor, before['weights'][name]) for name, tensor in best.items())
    assert any(before['modes']) and not all(before['modes'])
    said = logged(folder)
    assert not WARNED.search(said)
    assert f'report: {os.path.join("reported", "run", "report.html")}' in said
    assert 'gdino-lora label reported/run/' in said and 'best_coco_bbox_mAP_epoch_1.pth' in said
    of_run = [words(folder / name) for name in ('report.html', 'thresholds.json')]
    run_typed('gdino-lora report reported/run', things.folder)
    assert [words(folder / name) for name in ('report.html', 'thresholds.json')] == of_run


def test_a_report_that_fails_leaves_the_run_well(things: Things) -> None:
    folder = things.folder / 'failed/run'
    (folder / 'report.html').mkdir(parents=True)
    settings = {'default_hooks.checkpoint.save_best': 'coco/bbox_mAP', 'train_cfg.max_epochs': 2}
    runner = trained(things, str(folder), REPORT, **settings)
    assert_same_state(runner)
    (warning,) = WARNED.findall(logged(folder))
    assert 'the run itself is complete' in warning
    assert warning.endswith(f'again: gdino-lora report {os.path.join("failed", "run")}')
    assert [path.name for path in folder.glob('.*partial')] == []


@pytest.mark.parametrize('at', [1, 3], ids=['under way', 'at its end'])
def test_a_run_that_is_stopped_has_no_report(
    at: int, text_dir: str, base: str, tmp_path: Path
) -> None:
    hooks = [dict(type='PreemptHook'), dict(type='TermHook', at=at), dict(type='ReportHook')]
    if at == 3:  # the last: what it has begun comes to its end
        run(str(tmp_path), text_dir, base, by_epoch=True, hooks=hooks)
        assert 'SIGTERM came, and no report is written' in logged(tmp_path)
    else:
        with pytest.raises(SystemExit):
            run(str(tmp_path), text_dir, base, by_epoch=True, hooks=hooks)
        assert not WARNED.search(logged(tmp_path))
    assert not list(tmp_path.rglob('report.html')) and not list(tmp_path.rglob('thresholds.json'))


def test_other_ranks_than_the_first_write_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('mmdet_gdino_lora.report.hook.is_main_process', lambda: False)
    ReportHook().after_train(None)  # a runner would be asked for its folder

"""Runs with mmengine's EMAHook: measured, written and resumed is one and the same average."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.runner import Runner
from safetensors.torch import load_file
from torch import Tensor, nn

from mmdet_gdino_lora.files.read import read_file
from mmdet_gdino_lora.lora.store.base import read_weights
from tests.run_small import run

BOX_HEAD = 'bbox_head.reg_branches.0.0.weight'


def average(runner: Runner) -> nn.Module:
    return next(hook.ema_model for hook in runner.hooks if isinstance(hook, EMAHook))


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def go_on_from(epoch: int, whole: Path, work_dir: Path) -> str:
    """A work dir as a run leaves it that was stopped after an epoch."""
    work_dir.mkdir()
    shutil.copy(whole / f'epoch_{epoch}.pth', work_dir)
    (work_dir / 'last_checkpoint').write_text(str(work_dir / f'epoch_{epoch}.pth'))
    return str(work_dir)


@pytest.mark.parametrize(
    ('load_from', 'epochs', 'options'),
    [(False, 2, {}), (True, 2, dict(update_buffers=True)), (True, 3, dict(begin_epoch=2))],
    ids=['base_checkpoint', 'load_from-buffers', 'load_from-begin_epoch'],
)
def test_the_file_holds_the_whole_average_and_a_resume_goes_on_with_it(
    text_dir: str, base: str, tmp_path: Path, load_from: bool, epochs: int, options: dict[str, Any]
) -> None:
    settings = dict(
        by_epoch=True,
        batch_size=4,
        epochs=epochs,
        load_from=load_from,
        hooks=[dict(type='EMAHook', momentum=0.3, **options)],
    )
    whole = run(str(tmp_path / 'whole'), text_dir, base, **settings)
    averaged, raw = average(whole).module.state_dict(), whole.model.state_dict()
    assert BOX_HEAD in averaged and any('.lora_B.' in name for name in averaged)
    assert not torch.equal(averaged[BOX_HEAD], read_weights(base)[BOX_HEAD])
    assert differing(averaged, raw)

    content = read_file(str(tmp_path / f'whole/epoch_{epochs}.pth'))
    assert differing(content['state_dict'], averaged) == []
    kept = {n[7:]: w for n, w in content['ema_state_dict'].items() if n.startswith('module.')}
    assert differing(kept, raw) == []

    work_dir = go_on_from(1, tmp_path / 'whole', tmp_path / 'resumed')
    resumed = run(work_dir, text_dir, base, resume=True, **settings)
    assert differing(resumed.model.state_dict(), raw) == []
    assert differing(average(resumed).state_dict(), average(whole).state_dict()) == []


def test_the_folder_holds_the_average_that_was_measured(
    text_dir: str, base: str, tmp_path: Path
) -> None:
    runner = run(
        str(tmp_path / 'run'),
        text_dir,
        base,
        by_epoch=True,
        batch_size=4,
        epochs=2,
        scores=[0.4, 0.5],
        hooks=[dict(type='EMAHook', momentum=0.3)],
    )
    weights = load_file(tmp_path / 'run/epoch_2_adapter/adapter_model.safetensors')
    averaged = average(runner).module.state_dict()
    for name in averaged:
        peft = 'base_model.model.' + name.replace('.default', '')
        assert torch.equal(weights[peft], averaged[name]), name
    assert '| acc | 0.5 |' in (tmp_path / 'run/epoch_2_adapter/README.md').read_text()

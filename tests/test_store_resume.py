"""Runs whose base comes by load_from: resumed without a network, as mmdet and our tool do it."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdet_gdino_lora.files.read import read_file
from tests.builders import detector_cfg
from tests.run_small import config, run

TOOL = Path(__file__).parent.parent / 'tools/train.py'


def settings(text_dir: str) -> dict[str, Any]:
    """Backbone and text model name weights that only a network could bring."""
    cfg = detector_cfg(text_dir)
    far = dict(type='Pretrained', checkpoint='http://127.0.0.1:9/swin.pth')
    return dict(
        by_epoch=True,
        batch_size=4,
        load_from=True,
        backbone={**cfg['backbone'], 'init_cfg': far},
        language_model={**cfg['language_model'], 'init_cfg': None},
    )


@pytest.fixture(scope='module')
def whole(text_dir: str, base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work dir of a run of two epochs."""
    work_dir = tmp_path_factory.mktemp('whole')
    run(str(work_dir), text_dir, base, epochs=2, **settings(text_dir))
    return work_dir


def weights(work_dir: Path, epoch: int) -> dict[str, Tensor]:
    return read_file(str(work_dir / f'epoch_{epoch}.pth'))['state_dict']


def train(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """tools/train.py, in this process."""
    monkeypatch.setattr(sys, 'path', [str(TOOL.parent), *sys.path])
    monkeypatch.setattr(sys, 'argv', [str(TOOL), *arguments])
    runpy.run_path(str(TOOL), run_name='__main__')


@pytest.mark.parametrize('way', ['runner', 'tool', 'tool with a path'])
def test_it_ends_with_the_weights_of_the_whole_run(
    text_dir: str,
    base: str,
    tmp_path: Path,
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    work_dir = tmp_path / 'run'
    work_dir.mkdir()
    first = str(shutil.copy(whole / 'epoch_1.pth', work_dir))
    (work_dir / 'last_checkpoint').write_text(first)
    if way == 'runner':
        run(str(work_dir), text_dir, base, epochs=2, resume=True, **settings(text_dir))
    else:
        path = str(tmp_path / 'config.py')
        config(str(work_dir), text_dir, base, epochs=2, **settings(text_dir)).dump(path)
        train(monkeypatch, path, '--resume', *([first] if way == 'tool with a path' else []))
    resumed, wanted = weights(work_dir, 2), weights(whole, 2)
    assert resumed.keys() == wanted.keys() and any('lora_B' in name for name in wanted)
    assert [name for name in wanted if not torch.equal(resumed[name], wanted[name])] == []


def test_with_nothing_saved_yet_resuming_is_starting_from_the_configs_base(
    text_dir: str, base: str, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, work_dir = str(tmp_path / 'config.py'), tmp_path / 'run'
    config(str(work_dir), text_dir, base, epochs=1, **settings(text_dir)).dump(path)
    train(monkeypatch, path, '--resume')
    assert os.path.getsize(work_dir / 'epoch_1.pth') < 0.5 * os.path.getsize(base)
    begun, wanted = weights(work_dir, 1), weights(whole, 1)
    assert [name for name in wanted if not torch.equal(begun[name], wanted[name])] == []

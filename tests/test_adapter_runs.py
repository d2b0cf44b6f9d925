"""Runs of mmengine's: killed and resumed, tested from the adapter's checkpoint alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.runner.checkpoint import load_checkpoint

from tests.run_small import run
from tests.test_lora_checkpoint import base, build, detections, same  # noqa: F401

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize('count', ['epoch', 'iter'])
def test_a_killed_run_resumes_to_the_weights_of_the_whole_run(
    text_dir: str,
    base: str,  # noqa: F811
    tmp_path: Path,
    count: str,
) -> None:
    by_epoch = count == 'epoch'
    whole = run(str(tmp_path / 'whole'), text_dir, base, by_epoch=by_epoch)
    work_dir = str(tmp_path / 'killed')
    arguments = [sys.executable, '-m', 'tests.run_small', work_dir, text_dir, base, count, '3']
    killed = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = run(work_dir, text_dir, base, by_epoch=by_epoch, resume=True)
    assert (whole.iter, resumed.iter) == (4, 4)
    weights, others = whole.model.state_dict(), resumed.model.state_dict()
    assert weights.keys() == others.keys()
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []
    assert any(name.endswith('lora_B.default.weight') and w.any() for name, w in weights.items())

    last = Path(work_dir, 'last_checkpoint').read_text()
    assert os.path.getsize(last) < 0.5 * os.path.getsize(base)
    assert 'adapter_model.safetensors' in os.listdir(last.replace('.pth', '_adapter'))
    assert not [name for name in os.listdir(work_dir) if name.endswith('.partial')]
    again = build(text_dir, base_checkpoint=base)
    load_checkpoint(again, last)
    assert same(detections(resumed.model), detections(again))

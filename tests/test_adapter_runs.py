"""Runs of mmengine's: killed and resumed, tested from the adapter's checkpoint alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_checkpoint
from torch.multiprocessing import ProcessExitedException

from mmdet_gdino_lora.datasets.shapes import NEW_CLASSES, Split, write_shapes
from tests.builders import build
from tests.detectors import detections, same
from tests.processes import in_new_processes
from tests.run_small import run, run_until_killed
from tests.tool_run import ROOT, run_tool


def in_the_checkout(number: int, command: str) -> None:
    """A tool's command, in a process of its own."""
    run_tool(command, ROOT)


@pytest.mark.parametrize('count', ['epoch', 'iter'])
def test_a_killed_run_resumes_to_the_weights_of_the_whole_run(
    text_dir: str,
    base: str,
    tmp_path: Path,
    count: str,
) -> None:
    by_epoch = count == 'epoch'
    whole = run(str(tmp_path / 'whole'), text_dir, base, by_epoch=by_epoch)
    work_dir = str(tmp_path / 'killed')
    with pytest.raises(ProcessExitedException) as end:
        in_new_processes(run_until_killed, work_dir, text_dir, base, count)
    assert end.value.signal_name == 'SIGKILL'
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


def test_a_new_process_with_the_adapter_checkpoint_detects_the_same_to_the_bit(
    tmp_path: Path,
) -> None:
    splits = {name: Split(NEW_CLASSES, 4) for name in ('new_train', 'new_val')}
    root = f'{write_shapes(tmp_path / "shapes", splits=splits)}/'
    cfg = Config.fromfile(ROOT / 'configs/gdino_lora_shapes.py')
    cfg.data_root = root
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.data_root = root
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = root + 'annotations/new_val.json'
    cfg.train_cfg.update(max_epochs=1, val_interval=1)
    cfg.work_dir = str(tmp_path / 'run')
    runner = Runner.from_cfg(cfg)
    runner.train()
    runner.model.eval()
    with torch.no_grad():
        trained = [s for batch in runner.val_dataloader for s in runner.model.val_step(batch)]

    config, checkpoint = str(tmp_path / 'config.py'), str(tmp_path / 'run/epoch_1.pth')
    cfg.dump(config)
    out = str(tmp_path / 'detections.pkl')
    in_new_processes(in_the_checkout, f'python tools/test.py {config} {checkpoint} --out {out}')
    trained = [sample.pred_instances for sample in trained if 'pred_instances' in sample]
    tested = [sample['pred_instances'] for sample in load(out)]
    assert len(tested) == len(trained) == 4
    for one, other in zip(tested, trained):
        for key in ('bboxes', 'scores', 'labels'):
            assert torch.equal(one[key], other[key])

    sweep = f'python tools/sweep_scale.py {config} {checkpoint} --scales 0 1'
    run_tool(f'{sweep} --old-config {config} --out {tmp_path}/sweep', ROOT)
    rows = json.loads((tmp_path / 'sweep/sweep.json').read_text())
    assert [row['scale'] for row in rows] == [0, 1]
    assert all(0 <= row['new'] == row['old'] <= 1 for row in rows)
    assert (tmp_path / 'sweep/sweep.png').is_file()

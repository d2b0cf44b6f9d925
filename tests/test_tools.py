"""The tools as a person types them, after a training run as the README describes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.fileio import load
from mmengine.optim import AmpOptimWrapper
from safetensors.torch import load_file
from transformers import AutoModelForZeroShotObjectDetection

from mmdet_gdino_lora.lora.store.base import read_weights
from tests.builders import WITH_MM, WORDS, build, data_samples
from tests.tool_run import TOOLS, Things

TEXTS = '--texts "wheel bolt . cracked tile" --score-thr 0'


def printed(capsys: pytest.CaptureFixture, things: Things, command: str) -> str:
    capsys.readouterr()
    things.run(command)
    return capsys.readouterr().out


def test_training_leaves_the_adapter_beside_the_checkpoint(things: Things) -> None:
    weights = torch.load(things.checkpoint, weights_only=False)['state_dict']
    assert any(w.any() for name, w in weights.items() if 'lora_B' in name)
    folder = str(things.checkpoint).replace('.pth', '_adapter')
    assert 'adapter_model.safetensors' in os.listdir(folder)


def test_the_demo_switches_mixes_and_switches_off_adapters(
    things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    demo = f'python tools/image_demo.py my_things.py CHECKPOINT photo.jpg {TEXTS}'
    out = f'--out {tmp_path}/found.png'
    plain = printed(capsys, things, f'{demo} {out}')
    assert cv2.imread(f'{tmp_path}/found.png').shape[:2] == (64, 64)
    assert plain.count('wheel bolt') + plain.count('cracked tile') == 20
    assert printed(capsys, things, f'{demo} {out} --adapter default') == plain
    base = printed(capsys, things, f'{demo} {out} --adapter none')
    other = str(things.checkpoint).replace('.pth', '_adapter')
    assert base not in (plain, '')
    # The same adapter under another name: once whole, and in two halves.
    assert printed(capsys, things, f'{demo} {out} --adapter {other}') == plain
    half = printed(capsys, things, f'{demo} {out} --adapter default=0.5')
    assert half not in (plain, base)


@pytest.mark.parametrize(
    ('adapter', 'told'),
    [
        ('default=much', "'much' is no number"),
        ('nowhere/', "'nowhere/': neither"),
        ('none default', 'none is the base alone'),
    ],
)
def test_the_demo_tells_what_no_adapter_is(
    things: Things, capsys: pytest.CaptureFixture, adapter: str, told: str
) -> None:
    with pytest.raises(SystemExit) as end:
        things.run(
            f'python tools/image_demo.py my_things.py CHECKPOINT photo.jpg {TEXTS} '
            f'--adapter {adapter}'
        )
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith('error: --adapter') and told in error


def test_the_export_is_the_adapter_that_training_wrote(things: Things, tmp_path: Path) -> None:
    things.run(f'python tools/export_adapter.py my_things.py CHECKPOINT {tmp_path}/adapter/')
    written = str(things.checkpoint).replace('.pth', '_adapter')
    ours, theirs = (
        load_file(f'{folder}/adapter_model.safetensors')
        for folder in (tmp_path / 'adapter', written)
    )
    assert ours.keys() == theirs.keys() and ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert 'wheel bolt' in (tmp_path / 'adapter/README.md').read_text()
    config = json.loads((tmp_path / 'adapter/adapter_config.json').read_text())
    assert config['r'] == 16 and config['base_model_name_or_path'] == things.base


def test_merging_goes_from_the_base_to_the_tuned_model(things: Things, tmp_path: Path) -> None:
    merged = {}
    for scale in ('0', '0.5', '1'):
        out = f'{tmp_path}/{scale}.pth'
        things.run(f'python tools/merge_adapter.py my_things.py CHECKPOINT {out} --scale {scale}')
        merged[scale] = read_weights(out)
    things.run(f'python tools/merge_adapter.py my_things.py CHECKPOINT {tmp_path}/default.pth')
    base = read_weights(things.base)
    assert merged['0'].keys() == base.keys()
    assert all(torch.equal(merged['0'][name], base[name]) for name in base)
    default = read_weights(f'{tmp_path}/default.pth')
    assert all(torch.equal(merged['1'][name], default[name]) for name in default)
    moved = [name for name in base if not torch.equal(merged['1'][name], base[name])]
    assert any('decoder' in name for name in moved) and not any('encoder' in n for n in moved)
    for name in moved:
        middle = (merged['1'][name] + base[name]) / 2
        torch.testing.assert_close(merged['0.5'][name], middle, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ('arguments', 'told'),
    [('out.pt', "'out.pt': name it"), ('out.pth --scale 1.5', '--scale 1.5: give a number')],
)
def test_merging_tells_a_mistake(
    things: Things, capsys: pytest.CaptureFixture, arguments: str, told: str
) -> None:
    with pytest.raises(SystemExit) as end:
        things.run(f'python tools/merge_adapter.py my_things.py CHECKPOINT {arguments}')
    assert end.value.code == 2 and told in capsys.readouterr().err


@WITH_MM
def test_merged_for_transformers_transformers_loads_it(
    things: Things, special_tokens: None, tmp_path: Path
) -> None:
    things.run(
        f'python tools/merge_adapter.py my_things.py CHECKPOINT {tmp_path}/hf --format transformers'
    )
    model, report = AutoModelForZeroShotObjectDetection.from_pretrained(
        f'{tmp_path}/hf', output_loading_info=True
    )
    assert not report['missing_keys'] and not report['mismatched_keys']
    assert sum(p.numel() for p in model.parameters()) > 1e6


def test_shrinking_halves_the_file_and_keeps_the_values(things: Things, tmp_path: Path) -> None:
    out = f'{tmp_path}/half.safetensors'
    things.run(f'python tools/shrink_checkpoint.py {things.base} {out}')
    assert os.path.getsize(out) < 0.55 * os.path.getsize(things.base)
    halves, weights = load_file(out), read_weights(things.base)
    assert halves.keys() == weights.keys()
    assert {w.is_floating_point() for w in weights.values()} == {True, False}
    for name, weight in weights.items():
        kept = weight.half() if weight.is_floating_point() else weight
        assert halves[name].dtype == kept.dtype and torch.equal(halves[name], kept)
    with pytest.raises(SystemExit):
        things.run(f'python tools/shrink_checkpoint.py {things.base} {tmp_path}/half.pth')


def overlap(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """IoU of every box with every other one, both xyxy."""
    corner, end = (
        np.maximum(one[:, None, :2], other[:, :2]),
        np.minimum(one[:, None, 2:], other[:, 2:]),
    )
    shared = np.clip(end - corner, 0, None).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (one, other)]
    return shared / (areas[0][:, None] + areas[1] - shared)


def test_test_time_augmentation_finds_the_boxes_of_the_plain_test_and_more(
    things: Things, tmp_path: Path
) -> None:
    found = []
    for option in ('', '--tta'):
        out = tmp_path / f'found{option}.pkl'
        things.run(f'python tools/test.py my_things.py CHECKPOINT {option} --out {out}')
        found.append([sample['pred_instances'] for sample in load(out)])
    plain, augmented = found
    assert len(plain) == len(augmented) == 2
    for one, both in zip(plain, augmented):
        assert (both['scores'][:-1] >= both['scores'][1:]).all()
        # What the plain test is surest of is there again; a flip that is not undone moves it.
        best = one['bboxes'][one['scores'].argmax()][None].numpy()
        assert overlap(best, both['bboxes'].numpy()).max() > 0.5
        assert both['bboxes'].min() >= 0 and both['bboxes'].max() <= 64
        assert set(both['labels'].tolist()) <= {0, 1}


# ----------------------------------------------------------------------------- mixed precision


def test_mmengines_mixed_precision_trains_the_adapters(
    text_dir: str, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mmengine refuses it without a GPU; in bfloat16 the CPU runs the same code.
    monkeypatch.setattr(
        'mmengine.optim.optimizer.amp_optimizer_wrapper.is_cuda_available', lambda: True
    )
    detector = build(text_dir, base_checkpoint=base, lora=dict(preset='all', r=2)).train()
    trained = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    wrapper = AmpOptimWrapper(
        loss_scale='dynamic',
        dtype='bfloat16',
        optimizer=torch.optim.AdamW(trained.values(), lr=1e-3),
        clip_grad=dict(max_norm=0.1),
    )
    seen = set()
    layer = detector.decoder.layers[0]
    handle = layer.register_forward_hook(lambda *_: seen.add(torch.is_autocast_enabled('cpu')))
    for seed in (0, 1):
        images = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
        samples = data_samples(WORDS[:4], [3, 1], seed=seed)
        losses = detector.train_step(dict(inputs=list(images), data_samples=samples), wrapper)
        assert all(torch.isfinite(loss) for loss in losses.values())
    handle.remove()
    assert seen == {True}
    assert all(p.dtype == torch.float32 for p in trained.values())
    stuck = [name for name, p in trained.items() if torch.equal(p, before[name])]
    assert stuck == []


def test_tools_run_from_any_folder_with_this_checkouts_package(tmp_path: Path) -> None:
    """One tool as its own process, from where neither tools/ nor the package lies."""
    result = subprocess.run(
        [sys.executable, str(TOOLS / 'merge_adapter.py'), 'none.py', 'a.pth', 'out.pth'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stderr.strip().splitlines()[-1].startswith("error: config 'none.py'")

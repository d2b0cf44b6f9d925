"""Several adapters on one base: switched, combined, switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import base_only, export_adapter, load_adapter, set_adapter
from mmdet_gdino_lora.lora.store.merge import merged_weights
from tests.builders import build
from tests.detectors import detections, same, save, train

TEXT_LORA = dict(preset='decoder+text', r=3, use_rslora=True)


def close(one: tuple, other: tuple) -> bool:
    """Within a thousandth of a pixel and 1e-5 of a score."""
    (boxes, scores), (other_boxes, other_scores) = one, other
    near = torch.allclose(scores, other_scores, rtol=0, atol=1e-5)
    return near and torch.allclose(boxes, other_boxes, rtol=0, atol=1e-3)


@pytest.fixture(scope='module')
def first(text_dir: str, base: str) -> nn.Module:
    detector = build(text_dir, base_checkpoint=base)
    train(detector, steps=1)
    return detector.eval()


@pytest.fixture(scope='module')
def second(text_dir: str, base: str) -> nn.Module:
    """Another preset, another rank, and a norm trained beside it."""
    detector = build(
        text_dir, base_checkpoint=base, lora=TEXT_LORA, trainable=['memory_trans_norm']
    )
    train(detector, steps=2)
    return detector.eval()


@pytest.mark.parametrize('form', ['checkpoint', 'peft'])
def test_adapters_are_switched_combined_and_switched_off(
    text_dir: str,
    base: str,
    first: nn.Module,
    second: nn.Module,
    tmp_path: Path,
    form: str,
) -> None:
    if form == 'peft':
        source = str(tmp_path / 'second')
        export_adapter(second, source)
    else:
        source = save(second, tmp_path / 'second.pth')
    detector = build(text_dir, base_checkpoint=base)
    load_checkpoint(detector, save(first, tmp_path / 'first.pth'))
    trained = {name for name, p in detector.named_parameters() if p.requires_grad}
    detector.load_adapter(source, 'second')

    assert same(detections(detector), detections(first))
    detector.set_adapter('second')
    assert same(detections(detector), detections(second))
    with base_only(detector):
        plain = build(text_dir, lora=None, base_checkpoint=base)
        assert same(detections(detector), detections(plain))
    assert same(detections(detector), detections(second))
    detector.set_adapter({'default': 0.5})
    plain.load_state_dict(merged_weights(first, 0.5))
    assert close(detections(detector), detections(plain))
    detector.set_adapter({'default': 0.5, 'second': 0.5})
    assert not close(detections(detector), detections(plain))
    detector.set_adapter('default')
    assert same(detections(detector), detections(first))
    assert trained == {name for name, p in detector.named_parameters() if p.requires_grad}


def test_switching_off_while_training_loses_nothing(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base)
    for _ in range(2):
        train(detector, steps=1)
        before = {name: p.detach().clone() for name, p in detector.named_parameters()}
        with base_only(detector):
            pass
        assert all(torch.equal(p, before[name]) for name, p in detector.named_parameters())


def test_what_does_not_belong_is_refused(
    text_dir: str,
    base: str,
    second: nn.Module,
    tmp_path: Path,
) -> None:
    source = save(second, tmp_path / 'second.pth')
    content = torch.load(base)
    content['state_dict']['encoder.layers.0.norms.0.weight'] += 1e-3
    other = str(tmp_path / 'other.pth')
    torch.save(content, other)
    with pytest.raises(ConfigError, match='base.pth.*other.pth'):
        load_adapter(build(text_dir, base_checkpoint=other), source, 'second')
    detector = build(text_dir, base_checkpoint=base)
    with pytest.raises(ConfigError, match="'third' is not loaded"):
        set_adapter(detector, 'third')
    with pytest.raises(ConfigError, match="'default' is there already"):
        load_adapter(detector, source, 'default')
    with pytest.raises(ConfigError, match='a dot'):
        load_adapter(detector, source, 'v1.2')


def test_an_adapter_that_does_not_fit_leaves_the_detector_as_it_was(
    text_dir: str,
    base: str,
    second: nn.Module,
    tmp_path: Path,
) -> None:
    content = torch.load(save(second, tmp_path / 'second.pth'))
    weights = content['state_dict']
    lacking = next(name for name in weights if 'lora_A' in name)
    removed = weights.pop(lacking)
    torch.save(content, tmp_path / 'damaged.pth')
    weights[lacking] = removed
    torch.save(content, tmp_path / 'second.pth')
    detector = build(text_dir, base_checkpoint=base)
    before = detections(detector)
    trained = {name for name, p in detector.named_parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match='does not fit'):
        detector.load_adapter(str(tmp_path / 'damaged.pth'), 'second')
    assert same(detections(detector), before)
    assert trained == {name for name, p in detector.named_parameters() if p.requires_grad}
    detector.load_adapter(str(tmp_path / 'second.pth'), 'second')
    detector.set_adapter('second')
    assert same(detections(detector), detections(second))


def test_adapters_stay_in_float32_on_a_base_in_half_the_bytes(
    text_dir: str,
    base: str,
    second: nn.Module,
    tmp_path: Path,
) -> None:
    detector = build(text_dir, base_checkpoint=base, base_dtype='bfloat16')
    detector.load_adapter(save(second, tmp_path / 'second.pth'), 'second')
    added = [p for name, p in detector.named_parameters() if '.second' in name]
    assert added and all(p.dtype == torch.float32 for p in added)


def test_the_scaling_of_rslora_survives_switching(text_dir: str, base: str) -> None:
    lora = dict(r=4, lora_alpha=4, use_rslora=True)
    detector = build(text_dir, base_checkpoint=base, lora=lora)
    layer = detector.decoder.layers[0].ffn.layers[1]
    assert layer.scaling['default'] == 2.0
    detector.set_adapter({'default': 0.5})
    assert layer.scaling['default'] == 1.0
    with base_only(detector):
        pass
    detector.set_adapter()
    assert layer.scaling['default'] == 2.0

"""Several adapters on one base: switched, combined, switched off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.runner.checkpoint import load_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import base_only, export_adapter, load_adapter, set_adapter
from mmdet_gdino_lora.lora.store.merge import merged_weights
from mmdet_gdino_lora.lora.tensors import plain_tensors
from tests.builders import build, detector_cfg
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


def test_the_statistics_of_trained_norms_are_switched_too(text_dir: str, tmp_path: Path) -> None:
    neck = {**detector_cfg(text_dir)['neck'], 'norm_cfg': dict(type='BN', requires_grad=True)}
    plain = build(text_dir, lora=None, neck=neck)
    path = str(tmp_path / 'base.pth')
    torch.save(plain.state_dict(), path)
    detector = build(text_dir, neck=neck, base_checkpoint=path, trainable=[r'neck\..*\.bn'])
    train(detector, steps=1)
    tuned = {name: tensor.clone() for name, tensor in plain_tensors(detector).items()}
    assert detector.neck.convs[0].bn.num_batches_tracked == 1
    with base_only(detector):
        for name, tensor in plain_tensors(detector).items():
            assert torch.equal(tensor, plain.state_dict()[name]), name
    for name, tensor in plain_tensors(detector).items():
        assert torch.equal(tensor, tuned[name]), name
    detector.set_adapter({'default': 0.5})
    mean = 'neck.convs.0.bn.running_mean'
    torch.testing.assert_close(
        plain_tensors(detector)[mean], (plain.state_dict()[mean] + tuned[mean]) / 2
    )


def test_both_ways_of_loading_honour_the_recorded_count_of_attention_outputs(
    text_dir: str,
    base: str,
    first: nn.Module,
    tmp_path: Path,
) -> None:
    state_dict = first.state_dict()
    record = state_dict._metadata['']['mmdet_gdino_lora']
    record['attention_output_factor'] = 3 * record['attention_output_factor']
    path = str(tmp_path / 'other_peft.pth')
    torch.save(dict(meta={}, state_dict=state_dict), path)
    alone = build(text_dir, base_checkpoint=base)
    load_checkpoint(alone, path)
    assert not same(detections(alone), detections(first))
    beside = build(text_dir, base_checkpoint=base)
    beside.load_adapter(path, 'second')
    beside.set_adapter('second')
    assert same(detections(beside), detections(alone))


def test_an_adapter_without_record_is_not_put_on_random_weights(
    text_dir: str,
    base: str,
    first: nn.Module,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = str(tmp_path / 'adapter')
    export_adapter(first, folder)
    weights = load_file(f'{folder}/adapter_model.safetensors')
    save_file(weights, f'{folder}/adapter_model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ConfigError, match='no record of the base.*model.base_checkpoint'):
        build(text_dir).load_adapter(folder, 'second')
    detector = build(text_dir, base_checkpoint=base)
    detector.load_adapter(folder, 'second')
    detector.set_adapter('second')
    assert same(detections(detector), detections(first))


def test_a_full_checkpoint_that_freed_more_than_the_config_leads_back_to_the_base(
    text_dir: str,
    base: str,
    tmp_path: Path,
) -> None:
    options = dict(base_checkpoint=base, full_checkpoint=True)
    freed = build(text_dir, trainable=['^neck', 'level_embed'], **options)
    train(freed, steps=1)
    detector = build(text_dir, **options)
    load_checkpoint(detector, save(freed, tmp_path / 'freed.pth'))
    assert same(detections(detector), detections(freed))
    with base_only(detector):
        plain = build(text_dir, lora=None, base_checkpoint=base)
        assert same(detections(detector), detections(plain))
    assert same(detections(detector), detections(freed))


@pytest.mark.parametrize('active', [None, {'default': 0.5}], ids=['base', 'half'])
def test_checkpoints_hold_the_trained_adapter_whatever_is_switched_on(
    text_dir: str,
    base: str,
    first: nn.Module,
    tmp_path: Path,
    active: dict | None,
) -> None:
    path = save(first, tmp_path / 'first.pth')
    detector = build(text_dir, base_checkpoint=base)
    detector.set_adapter(active)
    load_checkpoint(detector, path)
    detector.set_adapter()
    assert same(detections(detector), detections(first))
    detector.set_adapter(active)
    again = build(text_dir, base_checkpoint=base)
    load_checkpoint(again, save(detector, tmp_path / 'again.pth'))
    assert same(detections(again), detections(first))


def test_folders_hold_the_trained_adapter_while_the_base_is_switched_on(
    text_dir: str, base: str, first: nn.Module, tmp_path: Path
) -> None:
    wanted = detections(first)
    first.set_adapter(None)
    try:
        first.export_adapter(str(tmp_path / 'first'))
    finally:
        first.set_adapter()
    detector = build(text_dir, base_checkpoint=base)
    detector.load_adapter(str(tmp_path / 'first'), 'again')
    detector.set_adapter('again')
    assert same(detections(detector), wanted)


def test_an_adapter_that_needs_a_base_nobody_can_read_again_leaves_no_trace(
    text_dir: str, base: str, second: nn.Module, tmp_path: Path
) -> None:
    source = save(second, tmp_path / 'second.pth')
    detector = build(text_dir)
    detector.load_state_dict(torch.load(base)['state_dict'])  # from where is not known
    before = detections(detector)
    with pytest.raises(ConfigError, match='unknown origin'):
        detector.load_adapter(source, 'second')
    assert not any('.second' in name for name, _ in detector.named_parameters())
    detector.set_adapter()
    assert same(detections(detector), before)


def test_what_the_initialisation_rewrote_is_the_bases_again_when_switched_off(
    text_dir: str, base: str
) -> None:
    lora = dict(preset='decoder', r=2, init_lora_weights='pissa', exclude_modules=['attn'])
    detector = build(text_dir, base_checkpoint=base, lora=lora)
    weight = 'decoder.layers.0.ffn.layers.1.weight'
    expected = torch.load(base)['state_dict'][weight]
    assert not torch.equal(plain_tensors(detector)[weight], expected)
    with base_only(detector):
        assert torch.equal(plain_tensors(detector)[weight], expected)
    assert f'{weight[:-6]}base_layer.weight' in detector.state_dict()

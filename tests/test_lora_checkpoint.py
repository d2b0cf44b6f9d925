"""Training checkpoints: what they hold, and every way that they come back in."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import pytest
import torch
from mmengine.logging import MessageHub, MMLogger
from mmengine.runner.checkpoint import load_checkpoint
from safetensors.torch import save_file
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import lora_state
from mmdet_gdino_lora.lora.store.merge import merged_weights
from tests.builders import build, detector_cfg
from tests.detectors import detections, same, save, train

LABEL = 'dn_query_generator.label_embedding.weight'


def in_a_run_with_load_from(path: str) -> None:
    """What mmengine's RuntimeInfoHook leaves behind in a run with this config."""
    MessageHub.get_current_instance().update_info('cfg', f'load_from = {path!r}\n')


def loaded(detector: nn.Module, path: str, caplog: pytest.LogCaptureFixture) -> nn.Module:
    """Loads as mmengine's runner does, and sees to it that nothing was reported."""
    with caplog.at_level(logging.WARNING):
        load_checkpoint(detector, path, logger=logging.getLogger('load'))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING], caplog.text
    return detector


@pytest.mark.parametrize(
    'variant',
    [
        dict(use_rslora=True),
        dict(use_dora=True, exclude_modules=['attn']),
        dict(init_lora_weights='pissa', exclude_modules=['attn']),
        dict(init_lora_weights='olora', exclude_modules=['attn']),
        dict(init_lora_weights='gaussian', lora_dropout=0.1),
        dict(lora_bias=True, exclude_modules=['attn']),
        dict(rank_pattern={r'ffn\.layers\.1': 1}),
    ],
    ids=lambda v: '-'.join(map(str, v)),
)  # fmt: skip
def test_variants_start_at_the_base_learn_and_come_back_to_the_bit(
    text_dir: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, variant: dict
) -> None:
    lora = dict(r=2, preset='encoder+decoder', **variant)
    plain = detections(build(text_dir, lora=None, base_checkpoint=base))
    detector = build(text_dir, lora=lora, base_checkpoint=base)
    # PiSSA and OLoRA split the base's own weights; all others leave them alone.
    tolerance = 1e-5 if variant.get('init_lora_weights') in ('pissa', 'olora') else 0
    for one, other in zip(plain, detections(detector)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert [name for name, seen in train(detector).items() if not seen] == []
    path = save(detector, tmp_path / 'tuned.pth')
    again = loaded(build(text_dir, lora=lora, base_checkpoint=base), path, caplog)
    assert same(detections(detector), detections(again))
    assert not same(plain, detections(again))


def test_a_checkpoint_holds_adapters_and_freed_parameters_only(
    text_dir: str, base: str, tmp_path: Path
) -> None:
    detector = build(text_dir, base_checkpoint=base, trainable=[r'^neck\.'])
    trained = {name for name, p in detector.named_parameters() if p.requires_grad}
    assert set(detector.state_dict()) == trained
    full = build(text_dir, base_checkpoint=base, trainable=[r'^neck\.'], full_checkpoint=True)
    assert set(full.state_dict()) > trained
    assert len(build(text_dir).state_dict()) > len(trained)  # a random base is nowhere else


def test_buffers_beside_trained_parameters_are_kept(text_dir: str, tmp_path: Path) -> None:
    neck = detector_cfg(text_dir)['neck']
    neck['norm_cfg'] = dict(type='BN', requires_grad=True)
    torch.save(build(text_dir, lora=None, neck=neck).state_dict(), tmp_path / 'base.pth')
    options = dict(neck=neck, base_checkpoint=str(tmp_path / 'base.pth'))
    assert not [n for n in build(text_dir, **options).state_dict() if 'running' in n]
    detector = build(text_dir, trainable=['neck.*bn'], **options)
    assert 'neck.convs.0.bn.running_mean' in detector.state_dict()


@pytest.mark.parametrize('full', [False, True])
def test_a_trained_detector_comes_back_to_the_bit(
    text_dir: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, full: bool
) -> None:
    options = dict(base_checkpoint=base, full_checkpoint=full, trainable=['text_feat_map'])
    detector = build(text_dir, **options)
    train(detector)
    path = save(detector, tmp_path / 'tuned.pth')
    again = loaded(build(text_dir, **options), path, caplog)
    assert same(detections(detector), detections(again))
    if full:
        assert same(detections(detector), detections(loaded(build(text_dir), path, caplog)))


def test_what_an_adapter_brought_stays_in_later_checkpoints(
    text_dir: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = build(text_dir, base_checkpoint=base)
    train(first)
    path = save(first, tmp_path / 'first.pth')
    second = build(text_dir, base_checkpoint=base, train_box_head=False)
    loaded(second, path, caplog)
    train(second)
    path = save(second, tmp_path / 'second.pth')
    again = loaded(build(text_dir, base_checkpoint=base), path, caplog)
    assert same(detections(second), detections(again))


def test_a_base_from_load_from_is_found_again_from_the_adapter_alone(
    text_dir: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    in_a_run_with_load_from(base)
    detector = loaded(build(text_dir), base, caplog)
    assert lora_state(detector).base.source == base
    assert same(detections(detector), detections(build(text_dir, lora=None, base_checkpoint=base)))
    train(detector)
    path = save(detector, tmp_path / 'tuned.pth')
    assert set(torch.load(path)['state_dict']) < set(dict(detector.named_parameters()))
    in_a_run_with_load_from(path)
    again = loaded(build(text_dir), path, caplog)
    assert same(detections(detector), detections(again))


def test_a_base_of_unknown_origin_stays_in_the_checkpoint(
    text_dir: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detector = loaded(build(text_dir), base, caplog)
    path = save(detector, tmp_path / 'tuned.pth')
    assert same(detections(detector), detections(loaded(build(text_dir), path, caplog)))


def refusal(detector: nn.Module, path: str) -> str:
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    with pytest.raises(ConfigError) as error:
        load_checkpoint(detector, path)
    message = str(error.value)
    assert '\n' not in message
    for name, parameter in detector.named_parameters():  # mmdet leaves some memory uninitialised
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())
    return message


@pytest.fixture(scope='module')
def adapter(text_dir: str, base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    detector = build(text_dir, base_checkpoint=base)
    return save(detector, tmp_path_factory.mktemp('adapter') / 'adapter.pth')


def test_another_base_is_refused_with_both_names(
    text_dir: str, base: str, adapter: str, tmp_path: Path
) -> None:
    content = torch.load(base)
    content['state_dict']['encoder.layers.0.norms.0.weight'] += 1e-3
    other = str(tmp_path / 'other.pth')
    torch.save(content, other)
    message = refusal(build(text_dir, base_checkpoint=other), adapter)
    assert 'base.pth' in message and 'other.pth' in message and 'encoder differ' in message


@pytest.mark.parametrize(
    ('lora', 'words'),
    [
        (dict(r=8), ['r=4', 'lora.r=8']),
        (dict(r=4, lora_alpha=32), ['lora_alpha=8', 'lora.lora_alpha=32']),
        (dict(r=4, use_rslora=True), ['use_rslora']),
        (dict(r=4, preset='encoder'), ["preset='encoder'", "preset='decoder'"]),
        (None, ['no model.lora', 'merge_adapter']),
    ],
)
def test_an_adapter_of_another_shape_is_refused_in_one_sentence(
    text_dir: str, base: str, adapter: str, lora: dict, words: list
) -> None:
    message = refusal(build(text_dir, base_checkpoint=base, lora=lora), adapter)
    for word in words:
        assert word in message, message


def test_a_base_that_moved_away_is_asked_for(
    text_dir: str, base: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    away = tmp_path / 'away.pth'
    away.write_bytes(Path(base).read_bytes())
    detector = build(text_dir, base_checkpoint=str(away))
    path = save(detector, tmp_path / 'tuned.pth')
    away.unlink()
    message = refusal(build(text_dir), path)
    assert 'away.pth' in message and 'model.base_checkpoint' in message
    loaded(build(text_dir, base_checkpoint=base), path, caplog)  # same weights, another name


def without_record(path: str, to: Path) -> str:
    """The tensors alone, as a plain dict or another program leaves them."""
    torch.save(dict(state_dict=dict(torch.load(path)['state_dict'])), to)
    return str(to)


def test_an_adapter_without_its_record_is_not_put_on_random_weights(
    text_dir: str, adapter: str, tmp_path: Path
) -> None:
    message = refusal(build(text_dir), without_record(adapter, tmp_path / 'plain.pth'))
    assert 'is random' in message and 'model.base_checkpoint' in message


def test_an_adapter_without_its_record_takes_the_base_that_is_there_and_says_so(
    text_dir: str, base: str, adapter: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detector = build(text_dir, base_checkpoint=base)
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    try:
        load_checkpoint(detector, without_record(adapter, tmp_path / 'plain.pth'))
    finally:
        logger.removeHandler(caplog.handler)
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1 and 'base.pth' in warned[0] and 'not be checked' in warned[0]
    wanted = build(text_dir, base_checkpoint=base)
    load_checkpoint(wanted, adapter)
    assert same(detections(detector), detections(wanted))


@pytest.mark.parametrize('form', ['file', 'folder'])
def test_a_base_with_a_relative_path_is_found_from_another_folder(
    text_dir: str,
    base: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    source = 'base.safetensors' if form == 'file' else 'base'
    (tmp_path / 'base').mkdir()
    path = tmp_path / source if form == 'file' else tmp_path / 'base/model.safetensors'
    save_file(torch.load(base)['state_dict'], path)
    monkeypatch.chdir(tmp_path)
    detector = build(text_dir, base_checkpoint=source)
    path = save(detector, tmp_path / 'tuned.pth')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    again = loaded(build(text_dir), path, caplog)
    assert same(detections(detector), detections(again))
    assert lora_state(again).base.source == source
    weights = merged_weights(again, 0.0)
    assert all(torch.equal(weights[n], w) for n, w in torch.load(base)['state_dict'].items())


def test_adapters_that_start_from_the_base_want_it_in_the_config(text_dir: str, base: str) -> None:
    lora = dict(r=2, init_lora_weights='pissa', exclude_modules=['attn'])
    with pytest.raises(ConfigError, match='use base_checkpoint='):
        build(text_dir, lora=lora)
    message = refusal(build(text_dir, lora=lora, base_checkpoint=base), base)
    assert 'use base_checkpoint=' in message


def test_a_load_from_of_another_architecture_is_refused(text_dir: str, base: str) -> None:
    encoder = {**detector_cfg(text_dir)['encoder'], 'num_layers': 1}
    message = refusal(build(text_dir, encoder=encoder), base)
    assert 'another architecture' in message and 'encoder.layers.1' in message


def test_an_adapter_for_other_classes_keeps_the_label_embedding_of_the_model(
    text_dir: str, base: str, adapter: str, caplog: pytest.LogCaptureFixture
) -> None:
    head = {**detector_cfg(text_dir)['bbox_head'], 'num_classes': 3}
    detector = build(text_dir, base_checkpoint=base, bbox_head=head)
    assert detector.dn_query_generator.label_embedding.weight.requires_grad
    path = copy.deepcopy(adapter)
    loaded(detector, path, caplog)
    assert detector.dn_query_generator.label_embedding.weight.shape[0] == 3
    assert LABEL in detector.state_dict()

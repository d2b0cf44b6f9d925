"""The detector against stock mmdet, its losses, its gradients, and what it says of bad input."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmdet_gdino_lora import LoRAGroundingDINO
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import PRESETS
from tests.builders import (
    WORDS,
    build,
    build_cfg,
    build_stock,
    data_samples,
    detector_cfg,
    stock_cfg,
)

NAMES = ['hot dog', 'dog', 'red_circle', 'small bird (left)', 'car', 'green star']
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def stock_on_the_base(text_dir: str, base: str) -> nn.Module:
    detector = build_stock(text_dir)
    state = torch.load(base, weights_only=True)['state_dict']
    missing, unexpected = detector.load_state_dict(state, strict=False)
    assert not missing and not unexpected
    return detector.eval()


def samples(boxes: tuple[int, ...] = (3, 1), **kwargs) -> list:
    result = data_samples(NAMES, boxes, **kwargs)
    for sample in result:
        sample.set_metainfo(dict(img_shape=(64, 96), batch_input_shape=(64, 96)))
    return result


@torch.no_grad()
def detections(detector: nn.Module) -> Iterator[Tensor]:
    for sample in detector.eval().predict(IMAGES, samples()):
        instances = sample.pred_instances
        yield torch.cat(
            [instances.bboxes, instances.scores[:, None], instances.labels[:, None]], dim=1
        )


@pytest.mark.parametrize('preset', PRESETS)
def test_fresh_adapters_change_nothing(text_dir: str, base: str, preset: str) -> None:
    stock = stock_on_the_base(text_dir, base)
    plain = build(text_dir, lora=None, base_checkpoint=base)
    adapted = build(text_dir, lora=dict(preset=preset, r=4), base_checkpoint=base)
    adapted.init_weights()
    for stock_result, plain_result, result in zip(
        detections(stock), detections(plain), detections(adapted)
    ):
        assert torch.equal(plain_result, result)
        torch.testing.assert_close(stock_result, result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('preset', PRESETS)
def test_every_trainable_parameter_gets_a_gradient_within_two_steps(
    text_dir: str, base: str, preset: str
) -> None:
    detector = build(text_dir, lora=dict(preset=preset, r=4), base_checkpoint=base)
    detector.train()
    trained = {name: p for name, p in detector.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=0.01)
    reached = set()
    for _ in range(2):
        optimizer.zero_grad()
        sum(detector.loss(IMAGES, samples()).values()).backward()
        reached |= {name for name, p in trained.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert sorted(set(trained) - reached) == []
    frozen = [p for name, p in detector.named_parameters() if name not in trained]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize('preset', PRESETS)
def test_gradients_are_equal_with_checkpointing_on_and_off(
    text_dir: str, base: str, preset: str
) -> None:
    results = []
    for checkpointing in (False, True):
        cfg = detector_cfg(text_dir, lora=dict(preset=preset, r=4), base_checkpoint=base)
        cfg.backbone.with_cp = checkpointing
        cfg.encoder.num_cp = cfg.encoder.num_layers if checkpointing else 0
        torch.manual_seed(0)
        detector = build_cfg(cfg).train()
        for name, parameter in detector.named_parameters():
            if 'lora_B' in name:  # at its start, 0, it would keep lora_A's gradient from being seen
                torch.nn.init.normal_(parameter, std=0.02)
        torch.manual_seed(1)
        losses = detector.loss(IMAGES, samples())
        sum(losses.values()).backward()
        gradients = {n: p.grad for n, p in detector.named_parameters() if p.requires_grad}
        assert all(grad is not None and grad.any() for grad in gradients.values())
        results.append((losses, gradients))
    (losses, gradients), (losses_again, gradients_again) = results
    for name, value in losses.items():
        torch.testing.assert_close(losses_again[name], value, rtol=1e-6, atol=1e-6)
    for name, grad in gradients.items():
        scale = grad.abs().max()
        assert (gradients_again[name] - grad).abs().max() <= 1e-6 * scale, name


def test_losses_carry_the_21_names_of_six_decoder_layers_and_the_denoising_ones(
    text_dir: str,
) -> None:
    cfg = detector_cfg(text_dir)
    cfg.decoder.num_layers = 6
    detector = build_cfg(cfg).train()
    losses = detector.loss(IMAGES, samples())
    suffixes = ['', *(f'_{layer}' for layer in range(5))]
    expected = [f'loss_{part}{s}' for part in ('ce', 'bbox', 'giou') for s in [*suffixes, '_enc']]
    assert len(expected) == 21
    denoising = [f'loss_{part}_dn{s}' for part in ('ce', 'bbox', 'giou') for s in suffixes]
    assert sorted(losses) == sorted(expected + denoising)


def test_the_loss_is_finite_and_reaches_every_parameter_without_any_box(
    text_dir: str, base: str
) -> None:
    detector = build(text_dir, base_checkpoint=base).train()
    losses = detector.loss(IMAGES, samples((0, 0)))
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.parameters() if p.requires_grad)


def test_denoising_can_be_switched_off(text_dir: str) -> None:
    detector = build(text_dir, dn_cfg=None).train()
    losses = detector.loss(IMAGES, samples())
    assert not [name for name in losses if '_dn' in name] and 'loss_ce_enc' in losses


def test_captions_from_the_loader_and_from_class_names_give_the_same_losses(
    text_dir: str, base: str
) -> None:
    detector = build(text_dir, base_checkpoint=base, dn_cfg=None).train()
    prepared = samples()
    for sample in prepared:
        caption = detector.language_model.caption_tokenizer.from_names(NAMES)
        sample.set_metainfo(dict(text=caption.text, caption_tokens=caption))
    losses = detector.loss(IMAGES, prepared)
    for name, value in detector.loss(IMAGES, samples()).items():
        assert torch.equal(value, losses[name])


def test_a_stock_config_needs_only_the_detectors_name(text_dir: str) -> None:
    cfg = stock_cfg(text_dir, lora=dict(preset='decoder', r=4))
    cfg.type = 'LoRAGroundingDINO'
    detector = build_cfg(cfg).train()
    detector.init_weights()
    assert isinstance(detector, LoRAGroundingDINO)
    assert 'loss_giou_enc' in detector.loss(IMAGES, samples())


def test_frozen_parts_stay_in_eval_mode_and_trained_parts_do_not(text_dir: str) -> None:
    detector = build(text_dir).train()
    assert not any(module.training for module in detector.backbone.modules())
    assert not any(module.training for module in detector.language_model.modules())
    assert detector.training and detector.decoder.training
    assert not any(module.training for module in detector.eval().modules())


def test_validation_steps_return_predictions_and_then_the_losses(text_dir: str) -> None:
    detector = build(text_dir).eval()
    *predictions, last = detector.val_step(dict(inputs=list(IMAGES), data_samples=samples()))
    assert len(predictions) == 2 and 'pred_instances' in predictions[0]
    assert sorted(last.loss) == sorted(
        f'loss_{part}{suffix}'
        for part in ('ce', 'bbox', 'giou')
        for suffix in ('', '_0', '_1', '_enc')
    )


def test_free_class_names_in_a_sentence_are_detected_by_name(text_dir: str) -> None:
    detector = build(text_dir).eval()
    prompted = samples()
    for sample in prompted:
        sample.set_metainfo(dict(text='hot dog . car .', custom_entities=True))
    with torch.no_grad():
        instances = detector.predict(IMAGES, prompted)[0].pred_instances
    assert set(instances.label_names) <= {'hot dog', 'car'}


def test_captions_past_the_limit_name_the_classes(text_dir: str) -> None:
    detector = build(text_dir).train()
    names = [f'{a} {b} {c}' for a in WORDS for b in WORDS[:7] for c in WORDS[:2]]
    with pytest.raises(ConfigError, match="'hot dog blue'"):
        detector.loss(IMAGES, data_samples(names, (1, 1)))


def test_more_classes_than_denoising_labels_is_told(text_dir: str) -> None:
    cfg = detector_cfg(text_dir)
    cfg.bbox_head.num_classes = 2
    with pytest.raises(ConfigError, match='bbox_head.num_classes'):
        build_cfg(cfg).train().loss(IMAGES, samples())


@pytest.mark.parametrize(
    'more',
    [dict(), dict(loss_each=torch.rand(3)), dict(loss_lists=[torch.rand(2), torch.rand(())])],
    ids=['numbers', 'a vector', 'a list'],
)
def test_losses_are_summed_as_by_mmengine(text_dir: str, more: dict) -> None:
    detector, numbers = build(text_dir), torch.rand(3, requires_grad=True)
    losses = dict(zip(('loss_ce', 'accuracy', 'd0.loss_bbox'), numbers.unbind()), **more)
    found = []
    for parse in (detector.parse_losses, lambda given: BaseModel.parse_losses(detector, given)):
        total, logged = parse(losses)
        found.append((total, logged, torch.autograd.grad(total, numbers)[0]))
    torch.testing.assert_close(*found)
    assert list(found[0][1]) == list(found[1][1])

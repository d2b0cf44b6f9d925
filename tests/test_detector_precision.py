"""Mixed precision, and frozen weights in half the bytes."""

from __future__ import annotations

import pytest
import torch

from mmdet_gdino_lora.errors import ConfigError
from tests.builders import WORDS, build, data_samples

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def total_loss(detector: torch.nn.Module) -> torch.Tensor:
    torch.manual_seed(1)  # denoising draws noise
    return sum(detector(IMAGES, data_samples(WORDS[:6], (3, 1)), mode='loss').values())


@pytest.mark.parametrize('preset', ['decoder', 'all'])
def test_frozen_weights_in_bfloat16_train_adapters_in_float32(
    text_dir: str, base: str, preset: str
) -> None:
    cfg = dict(lora=dict(preset=preset, r=4), base_checkpoint=base)
    exact = build(text_dir, **cfg).train()
    half = build(text_dir, **cfg, base_dtype='bfloat16').train()
    frozen = [p for p in half.parameters() if not p.requires_grad]
    assert sum(p.nbytes for p in frozen) < 0.55 * sum(p.numel() * 4 for p in frozen)
    loss = total_loss(half)
    loss.backward()
    torch.testing.assert_close(loss, total_loss(exact), rtol=0.05, atol=0)
    for name, parameter in half.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_prediction_and_validation_need_no_setting_of_their_own(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base, base_dtype='bfloat16').eval()
    batch = dict(inputs=list(IMAGES), data_samples=data_samples(WORDS[:6], (3, 1)))
    with torch.no_grad():
        *_, losses = detector.val_step(batch)
        detector.test_step(batch)
    assert torch.isfinite(losses.loss['loss_ce'])


def test_loss_and_predict_run_in_the_right_precision_without_forward(
    text_dir: str, base: str
) -> None:
    detector = build(text_dir, base_checkpoint=base, base_dtype='bfloat16', dn_cfg=None)
    losses = detector.train().loss(IMAGES, data_samples(WORDS[:6], (3, 1)))
    for name, value in detector(IMAGES, data_samples(WORDS[:6], (3, 1)), mode='loss').items():
        assert torch.equal(value, losses[name])
    with torch.no_grad():
        direct = detector.eval().predict(IMAGES, data_samples(WORDS[:6], (3, 1)))
        through = detector(IMAGES, data_samples(WORDS[:6], (3, 1)), mode='predict')
    for one, other in zip(direct, through):
        assert torch.equal(one.pred_instances.scores, other.pred_instances.scores)
        assert torch.equal(one.pred_instances.bboxes, other.pred_instances.bboxes)


@pytest.mark.parametrize('base_dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_step_under_autocast_is_close_to_one_without(
    text_dir: str, base: str, dtype: torch.dtype, base_dtype: str
) -> None:
    cfg = dict(lora=dict(preset='all', r=4), base_checkpoint=base, base_dtype=base_dtype)
    detector = build(text_dir, **cfg).train()
    with torch.autocast('cpu', dtype=dtype):
        mixed = total_loss(detector)
    torch.testing.assert_close(mixed, total_loss(detector), rtol=0.05, atol=0)
    mixed.backward()
    trained = [p for p in detector.parameters() if p.requires_grad]
    assert all(torch.isfinite(p.grad).all() for p in trained)


def test_unusable_settings_are_told(text_dir: str, base: str) -> None:
    with pytest.raises(ConfigError, match="base_dtype='float8'"):
        build(text_dir, base_checkpoint=base, base_dtype='float8')
    with pytest.raises(ConfigError, match='base_checkpoint'):
        build(text_dir, base_dtype='bfloat16')

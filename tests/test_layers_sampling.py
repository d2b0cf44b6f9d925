"""Deformable sampling on the CPU gives mmcv's numbers and gradients, and keeps little."""

from __future__ import annotations

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

from mmdet_gdino_lora.layers.cpu.sampling import sample_levels

SHAPES = ((9, 7), (5, 4), (2, 3), (1, 1))


def arguments(dtype=torch.float32, scale=1.6, queries=11) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    positions = sum(height * width for height, width in SHAPES)
    value = torch.randn(2, positions, 3, 8, dtype=dtype)
    locations = torch.rand(2, queries, 3, 4, 5, 2, dtype=dtype) * scale - (scale - 1) / 2
    weights = torch.rand(2, queries, 3, 4, 5, dtype=dtype)
    return tuple(tensor.requires_grad_() for tensor in (value, locations, weights))


def outputs(sample, value, locations, weights) -> list[torch.Tensor]:
    """The result and the three gradients."""
    out = sample(value, SHAPES, locations, weights)
    torch.manual_seed(1)
    return [out, *torch.autograd.grad(out, (value, locations, weights), torch.randn_like(out))]


@pytest.mark.parametrize('scale', [1.0, 1.6, 50.0])
def test_sampling_equals_mmcv(scale):
    given = arguments(scale=scale)
    expected = outputs(multi_scale_deformable_attn_pytorch, *given)
    for theirs, own in zip(expected, outputs(sample_levels, *given)):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def test_sampling_equals_mmcv_exactly_on_pixel_centres():
    value, locations, weights = arguments()
    sizes = torch.tensor([(width, height) for height, width in SHAPES])[:, None]
    with torch.no_grad():
        locations.copy_(((locations * sizes).floor() + 0.5) / sizes)
    expected = multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights)
    torch.testing.assert_close(sample_levels(value, SHAPES, locations, weights), expected)


def test_gradients_are_right_in_double_precision():
    value, locations, weights = arguments(torch.float64, queries=2)
    assert torch.autograd.gradcheck(
        lambda *given: sample_levels(given[0], SHAPES, *given[1:]), (value, locations, weights)
    )


def test_sampling_keeps_only_its_arguments():
    given = arguments()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sample_levels(given[0], SHAPES, *given[1:])
    assert {t.data_ptr() for t in kept} <= {t.data_ptr() for t in given}


def test_locations_that_are_no_numbers_do_not_crash():
    value, locations, weights = arguments()
    with torch.no_grad():
        locations[0, 0] = float('nan')
        locations[0, 1] = float('inf')
        locations[0, 2] = 1e20
    out = sample_levels(value, SHAPES, locations, weights)
    assert out[0, 0].isnan().all()
    assert torch.isfinite(out[0, 3:]).all() and torch.isfinite(out[1]).all()


def test_half_precision_features_keep_their_type():
    value, locations, weights = arguments()
    out = sample_levels(value.bfloat16(), SHAPES, locations, weights)
    assert out.dtype == torch.bfloat16
    expected = sample_levels(value, SHAPES, locations, weights)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)

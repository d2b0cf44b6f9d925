"""Multi-scale deformable attention never waits for the device here."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from mmcv.ops import MultiScaleDeformableAttention, get_compiling_cuda_version
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from mmengine.logging import MMLogger
from torch import Tensor

from mmdet_gdino_lora.layers.cpu.sampling import sample_levels
from mmdet_gdino_lora.layers.levels import grid, host_shapes


class LeanDeformableAttention(MultiScaleDeformableAttention):
    """This is mmcv's ``MultiScaleDeformableAttention``; parameters, names and results are the same.

    Deformable DETR, equation 3: a query z with the reference point p looks at a few points on every
    level x^l of the image, whose places and weights it predicts itself:

        sum over heads of W * (sum over levels and points of A * (W' x^l)(p + dp))

    Here ``value_proj`` is W', ``sampling_offsets(z)`` is dp, the softmax of
    ``attention_weights(z)`` is A, and ``output_proj`` is W, of all heads together.

    mmcv compares the number of positions with the levels' sizes on the device, which makes the
    host wait for it in every layer. Here the host knows the sizes.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        level_start_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Sample the levels around each query's reference point.

        Args:
            query: [B, Q, C], or [Q, B, C] unless ``batch_first``.
            key: ignored, as in mmcv.
            value: [B, S, C], the flattened levels; the query where None.
            identity: added to the output; the query where None.
            query_pos: added to the query.
            key_padding_mask: bool [B, S], True: padding, sampled as zero.
            reference_points: [B, Q, levels, 2 or 4] in 0..1: centres, or centres and sizes.
            spatial_shapes: int64 [levels, 2].
            level_start_index: int64 [levels].
            **kwargs: ignored, as in mmcv.

        Returns:
            The shape of ``query``.
        """
        value = query if value is None else value
        identity = query if identity is None else identity
        if query_pos is not None:
            query = query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        num_values = value.shape[1]
        # mmcv declares them optional, and needs them too.
        assert reference_points is not None
        assert spatial_shapes is not None and level_start_index is not None
        shapes = host_shapes(spatial_shapes)
        if sum(height * width for height, width in shapes) != num_values:
            raise ValueError(f'{num_values} positions do not fill levels of sizes {shapes}')

        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        value = value.unflatten(-1, (self.num_heads, -1))
        locations = self._locations(query, reference_points, spatial_shapes)
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (self.num_levels, self.num_points))

        sample = sampler(value.device.type, _has_cuda_ops())  # on the CPU: layers/cpu/sampling.py
        out = sample(value, spatial_shapes, level_start_index, locations, weights)
        out = self.output_proj(out)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return self.dropout(out) + identity

    def _locations(self, query: Tensor, reference_points: Tensor, spatial_shapes: Tensor) -> Tensor:
        """Compute the points p + dp, (x, y) in 0..1: [B, Q, heads, levels, points, 2]."""
        offsets = self.sampling_offsets(query)
        offsets = offsets.unflatten(-1, (self.num_heads, self.num_levels, self.num_points, 2))
        if reference_points.shape[-1] == 2:
            cells = grid(host_shapes(spatial_shapes), query.device).cells[:, None]
            return _moved(reference_points[:, :, None, :, None], offsets, cells)
        centres, sizes = reference_points[:, :, None, :, None].split(2, dim=-1)
        return _moved(centres, offsets, sizes * (0.5 / self.num_points))


def _moved(points: Tensor, offsets: Tensor, units: Tensor) -> Tensor:
    if offsets.dtype == points.dtype:
        return torch.addcmul(points, offsets, units)
    return points + offsets * units  # of two types, without a cast


Sampler = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Weighted bilinear samples: [B, S, heads, D] features of all levels, int64 [levels, 2] sizes and
int64 [levels] starts of the levels, locations [B, Q, heads, levels, points, 2] and weights
[B, Q, heads, levels, points] give [B, Q, heads * D]."""


def sampler(device_type: str, has_cuda_ops: bool) -> Sampler:
    """Choose the way of sampling; all give the same numbers.

    Args:
        device_type: ``'cpu'``, ``'cuda'`` or another.
        has_cuda_ops: whether mmcv was compiled with its CUDA kernels.
    """
    if device_type == 'cpu':
        return _sample_on_cpu
    if device_type == 'cuda' and has_cuda_ops:
        return _sample_with_kernel
    if device_type == 'cuda':
        _tell_what_no_kernel_costs()
    return _sample_as_defined


def _sample_on_cpu(
    value: Tensor, spatial_shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    return sample_levels(value, host_shapes(spatial_shapes), locations, weights)


def _sample_with_kernel(
    value: Tensor, spatial_shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    numbers = _exact(value, locations, weights)
    # The kernel's step, how many images it takes at a time, has to divide the batch.
    step = len(value)
    out = MultiScaleDeformableAttnFunction.apply(
        numbers[0], spatial_shapes, starts, *numbers[1:], step
    )
    return out.to(value.dtype)


def _sample_as_defined(
    value: Tensor, spatial_shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    numbers = _exact(value, locations, weights)
    out = multi_scale_deformable_attn_pytorch(numbers[0], host_shapes(spatial_shapes), *numbers[1:])
    return out.to(value.dtype)


def _exact(value: Tensor, locations: Tensor, weights: Tensor) -> list[Tensor]:
    """Make features, locations and weights contiguous and float32, float64 where the features are.

    mmcv has no kernel for bfloat16. Its kernel for float16 would have the locations rounded to
    float16 as well, to a tenth of a cell on a wide level, and adds up the features' gradient in
    float16. The locations come in float32 under autocast: only the features are copied.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    return [tensor.to(dtype).contiguous() for tensor in (value, locations, weights)]


@lru_cache(maxsize=1)
def _has_cuda_ops() -> bool:
    """Whether mmcv was compiled with its CUDA kernels."""
    return get_compiling_cuda_version() != 'not available'


@lru_cache(maxsize=1)
def _tell_what_no_kernel_costs() -> None:
    """Say it once; docs/cuda.md has the commands that counted it."""
    MMLogger.get_current_instance().warning(
        'mmcv was compiled without CUDA kernels: deformable attention samples in plain PyTorch. '
        'Results are the same; a call takes 10 operations instead of 2, 17 instead of 4 in '
        'backward, and where the encoder is trained each of its layers keeps 0.42 GB for an image '
        'of 800 x 1333 instead of 0.06. With a CUDA compiler, mmcv is compiled with its kernels: '
        'docs/cuda.md.'
    )

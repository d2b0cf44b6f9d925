"""Multi-scale deformable attention that never waits for the device."""

from __future__ import annotations

from functools import lru_cache

from mmcv.ops import MultiScaleDeformableAttention, get_compiling_cuda_version
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)
from torch import Tensor

from mmdet_gdino_lora.layers.cpu.sampling import sample_levels
from mmdet_gdino_lora.layers.levels import host_shapes


class FusedDeformableAttention(MultiScaleDeformableAttention):
    """mmcv's ``MultiScaleDeformableAttention``; same parameters, names and results.

    mmcv compares the number of positions with the levels' sizes on the device, which makes the
    host wait for it in every layer. Here the sizes are known to the host. On CUDA the sampling is
    mmcv's kernel; on the CPU see `layers.sampling`.
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
        **kwargs,
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
        batch, num_queries, _ = query.shape
        num_values = value.shape[1]
        shapes = host_shapes(spatial_shapes)
        if sum(height * width for height, width in shapes) != num_values:
            raise ValueError(f'{num_values} positions do not fill levels of sizes {shapes}')

        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        value = value.view(batch, num_values, self.num_heads, -1)
        grid = (batch, num_queries, self.num_heads, self.num_levels, self.num_points)
        offsets = self.sampling_offsets(query).view(*grid, 2)
        weights = self.attention_weights(query).view(*grid[:3], -1)
        weights = weights.softmax(-1).view(grid)
        if reference_points.shape[-1] == 2:
            scale = 1 / spatial_shapes.flip(-1)[:, None]
            locations = reference_points[:, :, None, :, None] + offsets * scale
        else:
            centres, sizes = reference_points[:, :, None, :, None].split(2, dim=-1)
            locations = centres + offsets * (sizes * (0.5 / self.num_points))

        if value.device.type == 'cpu':
            out = sample_levels(value, shapes, locations, weights)
        elif value.is_cuda and _has_cuda_ops():
            out = MultiScaleDeformableAttnFunction.apply(
                value, spatial_shapes, level_start_index, locations, weights, self.im2col_step
            )
        else:
            sample = (
                sample_levels if value.device.type == 'cpu' else multi_scale_deformable_attn_pytorch
            )
            out = sample(value, shapes, locations, weights)
        out = self.output_proj(out)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return self.dropout(out) + identity


@lru_cache(maxsize=1)
def _has_cuda_ops() -> bool:
    """Whether mmcv was compiled with its CUDA kernels."""
    return get_compiling_cuda_version() != 'not available'

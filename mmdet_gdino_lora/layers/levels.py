"""The host knows the feature levels' sizes without asking the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet_gdino_lora.transfer import to_device

Shapes = tuple[tuple[int, int], ...]


@lru_cache(maxsize=256)
def _levels(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    ends = np.cumsum([height * width for height, width in shapes])
    numbers = np.concatenate([np.ravel(shapes), [0], ends[:-1]]).astype(np.int64, copy=False)
    with torch.inference_mode(False):  # training may come next
        spatial_shapes, starts = to_device(numbers, device).split([2 * len(shapes), len(shapes)])
        spatial_shapes = spatial_shapes.view(-1, 2)
    spatial_shapes.host_shapes = shapes
    return spatial_shapes, starts


def level_tensors(feats: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Make mmdet's ``spatial_shapes`` and ``level_start_index`` for a feature pyramid.

    They are remembered per sizes and device, and sizes that come for the first time, as many do in
    multi-scale training, are one upload that nobody waits for. The first tensor carries its numbers
    on the host too, see `host_shapes`. Both are shared: never write into them.

    Args:
        feats: feature maps [B, C, H, W], one per level.

    Returns:
        int64 [levels, 2] as (height, width), and int64 [levels], the levels' first positions in
        the flattened features.
    """
    shapes = tuple((int(feat.shape[-2]), int(feat.shape[-1])) for feat in feats)
    return _levels(shapes, feats[0].device)


def host_shapes(spatial_shapes: Tensor | Shapes) -> Shapes:
    """Give the numbers in ``spatial_shapes``; waits for the device at most once per tensor.

    Args:
        spatial_shapes: int64 [levels, 2], from `level_tensors` or from mmdet; or the numbers
            themselves, which an exported graph computes from its input.
    """
    if isinstance(spatial_shapes, tuple):
        return spatial_shapes
    shapes = getattr(spatial_shapes, 'host_shapes', None)
    if shapes is None:
        shapes = tuple((int(height), int(width)) for height, width in spatial_shapes.tolist())
        spatial_shapes.host_shapes = shapes  # type: ignore[attr-defined]  # remembered on the tensor
    return shapes


def padding_masks(
    feats: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]], input_shape: tuple[int, int]
) -> list[Tensor] | None:
    """Mark the positions of each level that show no image, as mmdet's ``pre_transformer`` does.

    Args:
        feats: feature maps [B, C, H, W], one per level.
        image_shapes: (height, width) of each image before the batch was padded, in pixels.
        input_shape: (height, width) of the padded batch.

    Returns:
        bool [B, H, W] per level, True: padding; None where no image is padded.
    """
    image_shapes = [(height, width) for height, width, *_ in image_shapes]
    if all(shape == tuple(input_shape) for shape in image_shapes):
        return None
    masks = feats[0].new_ones((1, len(image_shapes), *input_shape))
    for index, (height, width) in enumerate(image_shapes):
        masks[0, index, :height, :width] = 0
    return [F.interpolate(masks, size=feat.shape[-2:])[0].to(torch.bool) for feat in feats]

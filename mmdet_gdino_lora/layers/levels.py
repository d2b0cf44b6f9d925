"""The host knows the feature levels' sizes without asking the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
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


class Grid(NamedTuple):
    """Numbers of all S positions of a feature pyramid, which depend on its sizes alone.

    Attributes:
        level: int64 [S], of each position.
        centres: float32 [S, 2], (x + 0.5, y + 0.5) within its level.
        sizes: float32 [levels, 2], (width, height).
        cells: float32 [levels, 2], 1 / sizes.
    """

    level: Tensor
    centres: Tensor
    sizes: Tensor
    cells: Tensor


@lru_cache(maxsize=32)
def grid(shapes: Shapes, device: torch.device) -> Grid:
    """Give the positions of levels of these sizes.

    They are remembered: 24 bytes a position, half a megabyte for an image of 800 x 1333. Never
    write into them.

    Args:
        shapes: (height, width) of each level.
        device: where the numbers are needed.
    """
    level = np.repeat(np.arange(len(shapes)), [height * width for height, width in shapes])
    centres = np.concatenate(
        [np.indices(shape)[::-1].reshape(2, -1).T + np.float32(0.5) for shape in shapes]
    )
    sizes = np.array(shapes)[:, ::-1]
    with torch.inference_mode(False):  # training may come next
        numbers = np.concatenate((centres, sizes, 1 / sizes)).astype(np.float32)
        parts = to_device(numbers, device).split([len(centres), len(shapes), len(shapes)])
        return Grid(to_device(level, device), *parts)


def centres(height: int, width: int, device: torch.device | str) -> Tensor:
    """Compute the centres of a level's positions from sizes that may be a graph's expressions.

    Args:
        height: of the level.
        width: of the level.
        device: where the result belongs.

    Returns:
        float32 [height * width, 2], (x, y) in 0..1.
    """
    y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
    x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
    places = torch.stack((x[None].expand(height, -1), y[:, None].expand(-1, width)), dim=-1)
    return places.flatten(0, 1)


def seen_sizes(
    shapes: Shapes, image_shapes: Sequence[tuple[int, int]], input_shape: tuple[int, int]
) -> np.ndarray | None:
    """Tell which part of each level shows the image, as mmdet's ``pre_transformer`` finds out.

    mmdet draws the padding in pixels and shrinks the drawing to every level, on the device.

    Args:
        shapes: (height, width) of each level.
        image_shapes: (height, width) of each image before the batch was padded, in pixels.
        input_shape: (height, width) of the padded batch.

    Returns:
        int64 [B, levels, 2], height and width; None where no image is padded.
    """
    images = np.array([shape[:2] for shape in image_shapes])
    if (images == np.array(input_shape[:2])).all():
        return None
    seen = np.empty((len(images), len(shapes), 2), np.int64)
    for level, shape in enumerate(shapes):
        for axis in range(2):
            # The pixel that stands for each row or column: the nearest one, rounded as torch does.
            step = np.float32(input_shape[axis] / shape[axis])
            pixels = np.floor(np.arange(shape[axis], dtype=np.float32) * step)
            seen[:, level, axis] = (pixels < images[:, axis, None]).sum(1)
    return seen


def padding_mask(shapes: Shapes, seen: np.ndarray) -> np.ndarray:
    """Mark the positions that show no image.

    Args:
        shapes: (height, width) of each level.
        seen: int64 [B, levels, 2], of `seen_sizes`.

    Returns:
        bool [B, S], True: padding.
    """
    masks = []
    for (height, width), sizes in zip(shapes, seen.transpose(1, 2, 0)):
        below = np.arange(height) >= sizes[0, :, None]
        beside = np.arange(width) >= sizes[1, :, None]
        masks.append((below[:, :, None] | beside[:, None]).reshape(len(seen), -1))
    return np.concatenate(masks, axis=1)

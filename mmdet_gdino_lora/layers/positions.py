"""Position encodings of an image's features: of rows and columns, not of every position."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from mmdet.models.layers import SinePositionalEncoding
from torch import Tensor

from mmdet_gdino_lora.layers.levels import Shapes
from mmdet_gdino_lora.layers.sine import sines, wavelengths
from mmdet_gdino_lora.transfer import to_device


def level_positions(
    encoding: SinePositionalEncoding,
    shapes: Shapes,
    seen: np.ndarray | None,
    device: torch.device,
) -> Iterator[Tensor]:
    """Encode the positions of every level as mmdet does.

    A row and a column have one encoding wherever they meet, so that sines are computed for a few
    hundred numbers. In the padding, which nothing looks at, rows and columns go on; mmdet encodes
    it by other numbers.

    Args:
        encoding: mmdet's, with its settings.
        shapes: (height, width) of each level.
        seen: int64 [B, levels, 2], the (height, width) that show the image; None without padding.
        device: where the encodings are needed.

    Yields:
        float32 [B or 1, height * width, 2 * num_feats] of each level.
    """
    if seen is None:
        seen = np.array(shapes)[None]
    numbers, counts = [], []
    for level, shape in enumerate(shapes):
        for axis in range(2):
            numbers.append(_coordinates(encoding, shape[axis], seen[:, level, axis]))
            counts.append(shape[axis])
    table = sines(
        to_device(np.concatenate(numbers, axis=1), device),
        wavelengths(encoding.num_feats, encoding.temperature, device),
    )
    encoded = table.split(counts, dim=1)
    for rows, columns in zip(encoded[::2], encoded[1::2]):
        size = (-1, rows.shape[1], columns.shape[1], -1)
        both = rows[:, :, None].expand(size), columns[:, None].expand(size)
        yield torch.cat(both, dim=-1).flatten(1, 2)


def _coordinates(encoding: SinePositionalEncoding, size: int, seen: np.ndarray) -> np.ndarray:
    """Of the rows, or columns, of one level: float32 [B, size]."""
    places = np.minimum(np.arange(1, size + 1), seen[:, None]).astype(np.float32)
    if not encoding.normalize:
        return places
    last = places[:, -1:] + np.float32(encoding.eps)
    return (places + np.float32(encoding.offset)) / last * np.float32(encoding.scale)

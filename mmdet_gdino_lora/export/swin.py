"""Swin's layers as a graph computes them whose image size is not known yet.

mmdet's decide in Python whether to pad, and number the windows by Python's integers: traced, a
graph of theirs knows one image size. Here each size is an expression of the input's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmdet.models.layers.transformer.utils import PatchEmbed, PatchMerging
from torch import Tensor

_APART = -100.0
"""What Swin adds to the logits of two positions that only the shift has made neighbours."""


class GraphPatchEmbed(PatchEmbed):
    """This is mmdet's ``PatchEmbed``; images are padded to whole patches in any case."""

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Embed the patches.

        Args:
            x: [B, 3, H, W].

        Returns:
            [B, rows * columns, C], and (rows, columns).
        """
        height, width = self.projection.stride
        rows, columns = _parts(x.shape[2], height), _parts(x.shape[3], width)
        x = F.pad(x, (0, columns * width - x.shape[3], 0, rows * height - x.shape[2]))
        x = self.projection(x).flatten(2).transpose(1, 2)
        return x if self.norm is None else self.norm(x), (rows, columns)


class GraphPatchMerging(PatchMerging):
    """This is mmdet's ``PatchMerging`` of 2 x 2 patches, without ``nn.Unfold``."""

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """Merge neighbours.

        Args:
            x: [B, H * W, C].
            input_size: (H, W).

        Returns:
            [B, rows * columns, 2 * C], and (rows, columns).
        """
        (height, width), (batch, _, channels) = input_size, x.shape
        rows, columns = _parts(height, 2), _parts(width, 2)
        x = x.view(batch, height, width, channels)
        x = F.pad(x, (0, 0, 0, 2 * columns - width, 0, 2 * rows - height))
        x = x.view(batch, rows, 2, columns, 2, channels).permute(0, 1, 3, 5, 2, 4)
        x = x.reshape(batch, rows * columns, 4 * channels)
        return self.reduction(x if self.norm is None else self.norm(x)), (rows, columns)


class GraphWindowAttention(ShiftWindowMSA):
    """This is mmdet's ``ShiftWindowMSA``, its ``WindowMSA`` included."""

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attend within windows.

        Args:
            query: [B, H * W, C].
            hw_shape: (H, W).

        Returns:
            [B, H * W, C].
        """
        (height, width), (batch, _, channels) = hw_shape, query.shape
        size, shift = self.window_size, self.shift_size
        rows, columns = _parts(height, size), _parts(width, size)
        x = query.view(batch, height, width, channels)
        x = F.pad(x, (0, 0, 0, columns * size - width, 0, rows * size - height))
        if shift:
            x = torch.roll(x, (-shift, -shift), (1, 2))
        x = x.view(batch, rows, size, columns, size, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * columns, size * size, channels)
        x = self._attend(x, self._apart(rows, columns, x) if shift else None)
        x = x.view(batch, rows, columns, size, size, channels).permute(0, 1, 3, 2, 4, 5)
        x = x.reshape(batch, rows * size, columns * size, channels)
        if shift:
            x = torch.roll(x, (shift, shift), (1, 2))
        return x[:, :height, :width].reshape(batch, height * width, channels)

    def _attend(self, x: Tensor, apart: Tensor | None) -> Tensor:
        """Attend within each window: [B, windows, positions, C] to the same shape."""
        layer, positions = self.w_msa, self.window_size**2
        heads = layer.num_heads
        query, key, value = (
            layer.qkv(x).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        )
        bias = layer.relative_position_bias_table[layer.relative_position_index.view(-1)]
        bias = bias.view(positions, positions, heads).permute(2, 0, 1)
        logits = (query * layer.scale) @ key.transpose(-2, -1) + bias
        if apart is not None:
            logits = logits + apart
        return layer.proj((logits.softmax(-1) @ value).transpose(2, 3).flatten(3))

    def _apart(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Mark positions of a window that come from opposite edges: [windows, 1, P, P]."""
        size = self.window_size

        def part(count: int) -> Tensor:
            end = count * size
            place = torch.arange(end, device=like.device)
            return (place >= end - size).long() + (place >= end - self.shift_size).long()

        parts = part(rows)[:, None] * 3 + part(columns)
        parts = parts.view(rows, size, columns, size).permute(0, 2, 1, 3)
        parts = parts.reshape(rows * columns, size * size)
        apart = parts[:, None] != parts[:, :, None]
        return (apart.to(like.dtype) * _APART)[:, None]


def _parts(length: int, size: int) -> int:
    """The number of parts that cover a length."""
    return (length + size - 1) // size

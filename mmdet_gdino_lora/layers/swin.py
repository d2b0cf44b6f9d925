"""Swin's blocks: checkpointed in a way that works behind frozen layers, attention in one kernel."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock, WindowMSA
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmdet_gdino_lora.layers.bias import ALIGNMENT
from mmdet_gdino_lora.layers.checkpointing import gradient_flows
from mmdet_gdino_lora.layers.frozen import derived
from mmdet_gdino_lora.transfer import to_device


class LeanSwinBlock(SwinBlock):
    """This block is mmdet's; ``with_cp=True`` checkpoints it where a gradient flows through it.

    mmdet checkpoints in the re-entrant way, and only behind an input that needs a gradient: see
    `checkpointing.run_checkpointed` for what becomes of adapters then.
    """

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Run window attention and feed-forward, each added to its input.

        Args:
            x: [B, H * W, C].
            hw_shape: (H, W).

        Returns:
            [B, H * W, C].
        """
        if self.with_cp and gradient_flows(self, x):
            return checkpoint(self._block, x, hw_shape, use_reentrant=False)
        return self._block(x, hw_shape)

    def _block(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), hw_shape)
        return self.ffn(self.norm2(x), identity=x)


class LeanShiftWindowMSA(ShiftWindowMSA):
    """This is mmdet's shifted window attention on ``scaled_dot_product_attention``.

    Parameters, names and results are the same. mmdet draws the regions that may not see each other
    into an image, in every block of every step.
    """

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Attend within windows.

        Args:
            query: [B, H * W, C].
            hw_shape: (H, W).

        Returns:
            [B, H * W, C].
        """
        attention: WindowMSA = self.w_msa
        trains = attention.relative_position_bias_table.requires_grad and torch.is_grad_enabled()
        # torch.compile takes minutes over the symbolic sizes of what follows.
        if trains or attention.attn_drop.p or torch.compiler.is_compiling():
            return super().forward(query, hw_shape)
        (height, width), size, shift = hw_shape, self.window_size, self.shift_size
        x = query.unflatten(1, (height, width))
        right, below = -width % size, -height % size
        if right or below:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
        shape = height + below, width + right
        windows = self.window_partition(x).flatten(1, 2)
        regions = _regions(shape, size, shift, query.device) if shift else None
        windows = _attend(attention, windows, regions).unflatten(1, (size, size))
        x = self.window_reverse(windows, *shape)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        if right or below:
            x = x[:, :height, :width].contiguous()
        return self.drop(x.flatten(1, 2))


def _attend(attention: WindowMSA, x: Tensor, regions: Tensor | None) -> Tensor:
    """Attend within each window.

    Args:
        attention: mmdet's, with the parameters.
        x: [B * windows, N, C].
        regions: [windows, N rounded up], a number for each token; those of one number see each
            other. None: all do.

    Returns:
        [B * windows, N, C].
    """
    heads = attention.num_heads
    qkv = attention.qkv(x).unflatten(-1, (3, heads, -1))
    bias = _bias(attention, qkv.dtype)
    tokens = qkv.shape[1]
    if regions is None:
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind()
        mask = bias[None]
    else:
        # The images are what the windows' biases repeat for: windows go to the heads.
        of_images = qkv.unflatten(0, (-1, len(regions))).permute(3, 0, 1, 4, 2, 5)
        query, key, value = of_images.flatten(2, 3).unbind()
        apart = regions[:, None, None] != regions[:, None, :tokens, None]
        mask = torch.add(bias, apart, alpha=-100).flatten(0, 1)[None]
    out = F.scaled_dot_product_attention(
        query, key, value, mask[..., :tokens], scale=attention.scale
    )
    out = out.transpose(1, 2)  # as it lies in memory: the windows are copied to the images once
    if regions is not None:
        out = out.unflatten(2, (-1, heads)).transpose(1, 2).flatten(0, 1)
    return attention.proj_drop(attention.proj(out.flatten(2)))


def _bias(attention: WindowMSA, dtype: torch.dtype) -> Tensor:
    """What every query's place relative to a key's adds: [heads, N, N rounded up]."""

    def make(table: Tensor) -> Tensor:
        index = attention.relative_position_index
        bias = table[F.pad(index, (0, -index.shape[1] % ALIGNMENT))]
        return bias.permute(2, 0, 1).to(dtype).contiguous()

    return derived(attention.relative_position_bias_table, dtype, make)


@lru_cache(maxsize=64)
def _regions(shape: tuple[int, int], size: int, shift: int, device: torch.device) -> Tensor:
    """Number the parts that the cyclic shift has put together, [windows, N rounded up]."""

    def parts(length: int) -> np.ndarray:
        return np.repeat([0, 1, 2], [length - size, size - shift, shift])

    rows, columns = parts(shape[0]), parts(shape[1])
    numbers = (3 * rows[:, None] + columns).astype(np.uint8)
    windows = numbers.reshape(shape[0] // size, size, shape[1] // size, size)
    windows = windows.transpose(0, 2, 1, 3).reshape(-1, size * size)
    windows = np.pad(windows, ((0, 0), (0, -windows.shape[1] % ALIGNMENT)))
    with torch.inference_mode(False):  # training may come next
        return to_device(windows, device)

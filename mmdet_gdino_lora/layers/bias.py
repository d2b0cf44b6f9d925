"""A mask that several layers share becomes their attention bias once, not in each of them."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT = 16
"""Of a bias's rows, in numbers: attention kernels on CUDA copy a bias of another length."""


def as_bias(mask: Tensor, like: Tensor) -> Tensor:
    """Turn a mask into what is added to attention's logits.

    Attention kernels turn a bool mask into a bias themselves, and keep that for the backward pass:
    in every layer.

    Args:
        mask: bool [..., K], True: hidden; anything else is a bias already.
        like: of the device and, but for autocast, of the type of the bias.

    Returns:
        [..., K], -inf where hidden.
    """
    if mask.dtype != torch.bool:
        return mask
    kind, keys = like.device.type, mask.shape[-1]
    autocast = torch.is_autocast_enabled(kind) and like.dtype != torch.float64
    dtype = torch.get_autocast_dtype(kind) if autocast else like.dtype
    rows = mask.new_zeros(*mask.shape[:-1], keys + -keys % ALIGNMENT, dtype=dtype)
    return rows[..., :keys].masked_fill_(mask, float('-inf'))

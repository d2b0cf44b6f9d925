"""Sines and cosines of coordinates, as mmdet encodes them, in few operations."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=16)
def wavelengths(count: int, temperature: float, device: torch.device) -> Tensor:
    """Give mmdet's divisors of a coordinate, each for a sine and a cosine.

    Args:
        count: numbers that encode a coordinate, even.
        temperature: of the longest wave.
        device: where they are needed. They are remembered there.

    Returns:
        float32 [count / 2]. Shared: never write into it.
    """
    with torch.inference_mode(False):  # training may come next
        pairs = torch.arange(0, count, 2, dtype=torch.float32)
        return (temperature ** (pairs / count)).to(device)


def sines(coordinates: Tensor, divisors: Tensor) -> Tensor:
    """Encode coordinates.

    Args:
        coordinates: [...], times 2 pi where they are in 0..1.
        divisors: [n], of `wavelengths`.

    Returns:
        [..., 2 * n]: sine and cosine in turns.
    """
    angles = coordinates[..., None] / divisors
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def encode_boxes(boxes: Tensor, width: int, temperature: float = 10000) -> Tensor:
    """Encode boxes as mmdet's ``coordinate_to_encoding``.

    Args:
        boxes: [B, Q, 4] as (cx, cy, w, h) in 0..1.
        width: numbers for each coordinate.
        temperature: of the longest wave.

    Returns:
        [B, Q, 4 * width], of (cy, cx, w, h).
    """
    cx, cy, w, h = (boxes * (2 * math.pi)).unbind(-1)
    divisors = wavelengths(width, temperature, boxes.device)
    return sines(torch.stack((cy, cx, w, h), dim=-1), divisors).flatten(-2)

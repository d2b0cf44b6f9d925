"""Boxes before their sigmoid, where each decoder layer moves those of the layer before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def before_sigmoid(boxes: Tensor, eps: float) -> Tensor:
    """Invert the sigmoid as mmdet does, for numbers that lie in 0..1 already.

    Args:
        boxes: [...], in 0..1.
        eps: smallest distance from 0, and from 1, that is told apart.
    """
    return torch.log(boxes.clamp(min=eps) / (1 - boxes).clamp(min=eps))


class BeforeSigmoid(torch.autograd.Function):
    """This is `before_sigmoid` with half of the operations that autograd takes on the way back."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, eps: float) -> Tensor:
        """Invert the sigmoid of numbers in 0..1."""
        rest = 1 - boxes
        low, high = boxes.clamp(min=eps), rest.clamp(min=eps)
        ctx.save_for_backward(boxes, rest, low, high)
        return torch.log(low / high)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Give grad * (1 / x + 1 / (1 - x)), of each summand nothing where its clamp has cut."""
        boxes, rest, low, high = ctx.saved_tensors
        from_0 = torch.where(boxes == low, grad / low, 0)
        return from_0 + torch.where(rest == high, grad / high, 0), None

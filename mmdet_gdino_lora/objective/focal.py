"""Sigmoid focal loss over tokens, with its gradient computed in the same pass.

For a logit x with p = sigmoid(x), RetinaNet's focal loss (Lin et al., eq. 5) is

    target 0:  background(x) = (1 - alpha) * p^gamma       * -log(1 - p)
    target 1:  span(x)       = alpha       * (1 - p)^gamma * -log(p)

All but a few of the millions of (query, token) pairs have target 0. So the loss is the sum of
``background`` over everything, plus ``span - background`` at the few pairs with target 1: the
dense part doesn't depend on the matching, needs no target tensor, and its gradient

    d background / dx = (1 - alpha) * p^gamma * (gamma * (1 - p) * -log(1 - p) + p)

comes out of the same numbers. Logits of -inf have p = 0: no loss, no gradient, no NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from mmdet_gdino_lora.objective import cpu

#: Logits from here down to -inf have equal costs.
LOWEST_LOGIT = -1000.0


def span_minus_background(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """``span(x) - background(x)`` of the module's docstring, elementwise.

    This is also DETR's class cost for focal losses (Deformable DETR, ``models/matcher.py``:
    ``pos_cost_class - neg_cost_class``), with exact logarithms instead of ``log(p + 1e-8)``.
    """
    x = logits.clamp(min=LOWEST_LOGIT)
    p = x.sigmoid()
    background = softplus(x)  # -log(1 - p); -log(p) is this less x
    span = (1 - p).pow_(gamma).mul_(alpha).mul_(background - x)
    return span.addcmul_(p.pow_(gamma), background, value=alpha - 1)


def span_grad(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """Derivative of ``span(x)`` of the module's docstring, elementwise; 0 where x is -inf."""
    finite = logits > -torch.inf
    x = torch.where(finite, logits, 0)
    p, q = x.sigmoid(), (-x).sigmoid()
    return torch.where(finite, -alpha * q**gamma * (gamma * p * softplus(-x) + q), 0)


def background_focal(
    logits: Tensor, mask: Tensor, alpha: float, gamma: float, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Focal loss with target 0 on every valid token, summed per query, and its gradient.

    Args:
        logits: [L, B, Q, C], C at least T; columns from T on are padding. Any float type.
        mask: [B, T] bool, True for valid tokens.
        alpha: Weight of target 1; target 0 has ``1 - alpha``.
        gamma: Focusing exponent.
        with_grad: Whether the gradient is wanted.

    Returns:
        The sums [L, B, Q], and the derivative by ``logits`` [L, B, Q, C] (None without
        ``with_grad``), both in float32 (float64 for float64 logits). Nothing is differentiable.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.detach()
    grad = torch.empty_like(logits, dtype=dtype) if with_grad else None
    if cpu.runs_here(logits):
        sums = logits.new_zeros(logits.shape[:3], dtype=dtype)
        for block, x, quick in cpu.background_blocks(logits, mask, dtype):
            here = None if grad is None else grad[block]
            background_block(x, alpha, gamma, sums[block[:-1]], here, quick)
        if grad is not None:
            cpu.clear_padding(grad, mask)
        return sums, grad
    sums = logits.new_empty(logits.shape[:3], dtype=dtype)
    num_tokens = mask.shape[1]
    x = logits[..., :num_tokens].to(dtype).masked_fill(~mask[:, None], -torch.inf)
    background_block(x, alpha, gamma, sums, None if grad is None else grad[..., :num_tokens])
    if grad is not None and num_tokens < grad.shape[-1]:
        grad[..., num_tokens:] = 0
    return sums, grad


def background_block(
    x: Tensor, alpha: float, gamma: float, sums: Tensor, grad: Tensor | None, quick: bool = False
) -> None:
    """Write the sums of ``background(x)`` over the last dimension, and its gradient, in place.

    Args:
        x: [..., T] logits, -inf at padding.
        alpha: Weight of target 1.
        gamma: Focusing exponent.
        sums: [...], written.
        grad: [..., T], written; None: not wanted.
        quick: Whether log(1 - p) may be taken of the rounded p, which takes half the time and is
            exact enough for logits below :data:`~.cpu.SAFE_LOGIT`.
    """
    p = x.sigmoid()
    log_q = p.neg().log1p_() if quick else logsigmoid(-x)
    weight = p.pow(gamma).mul_(1 - alpha)
    torch.sum(weight * log_q, dim=-1, out=sums)
    sums.neg_()
    if grad is not None:
        gamma_q = torch.rsub(p, gamma, alpha=gamma)  # gamma * (1 - p)
        torch.mul(weight, torch.addcmul(p, gamma_q, log_q, value=-1, out=gamma_q), out=grad)


class KnownGradient(torch.autograd.Function):
    """Values [L] of each group, whose gradient by the group's logits [L, B, Q, C] is known.

    Value l depends on layer l alone. The gradients are scaled in place and handed on, unless the
    graph is kept for another pass.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, grads: Sequence[Tensor | None], *logits: Tensor
    ) -> Tensor:
        ctx.grads = list(grads)
        ctx.dtypes = [tensor.dtype for tensor in logits]
        ctx.sizes = [len(tensor) for tensor in logits]
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_values: Tensor) -> tuple[Tensor | None, ...]:
        kept = _graph_is_kept()
        scaled = []
        for grad, factor, dtype in zip(ctx.grads, grad_values.split(ctx.sizes), ctx.dtypes):
            if grad is not None:
                factor = factor[:, None, None, None]
                grad = (grad * factor if kept else grad.mul_(factor)).to(dtype)
            scaled.append(grad)
        if not kept:
            ctx.grads = [None] * len(ctx.grads)
        return (None, None, *scaled)


def _graph_is_kept() -> bool:
    """Whether the running backward pass was called with ``retain_graph``."""
    keep_graph = getattr(torch._C._autograd, '_get_current_graph_task_keep_graph', None)
    return keep_graph is None or keep_graph()

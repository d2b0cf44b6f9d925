"""Attention with dropout keeps no attention weights on the CPU either."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Run ``scaled_dot_product_attention``, lean with dropout too.

    Torch's fused kernel for the CPU knows no dropout; with it, torch writes down all attention
    weights several times over. Here they exist for one head of one image at a time and are computed
    again in the backward pass, the dropped ones drawn again from the same seed.

    Args:
        query: [B, heads, Q, D].
        key: [B, heads, K, D].
        value: [B, heads, K, D].
        mask: broadcast to [B, heads, Q, K]; bool, True: seen, or added to the logits.
        dropout: share of the attention weights that is dropped.

    Returns:
        [B, heads, Q, D].
    """
    if not dropout or query.device.type != 'cpu':
        return F.scaled_dot_product_attention(query, key, value, mask, dropout)
    dtype, exact = query.dtype, torch.promote_types(query.dtype, torch.float32)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=exact).masked_fill_(~mask, float('-inf'))
        mask = mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
    seed = int(torch.randint(2**62, ()))
    with torch.autocast('cpu', enabled=False):
        query, key, value = query.to(exact), key.to(exact), value.to(exact)
        return _DropoutAttention.apply(query, key, value, mask, dropout, seed).to(dtype)


class _DropoutAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        seed: int,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.dropout, ctx.seed = dropout, seed
        # Heads inside the queries, as the next layer wants them.
        out = value.new_empty(len(query), query.shape[2], query.shape[1], value.shape[3])
        out = out.transpose(1, 2)
        for at, weights, kept in _heads(query, key, mask, dropout, seed):
            out[at] = weights.mul_(kept) @ value[at]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for at, weights, kept in _heads(query, key, mask, ctx.dropout, ctx.seed):
            grads[2][at] = (weights * kept).t() @ grad[at]
            slopes = (grad[at] @ value[at].t()).mul_(kept)
            slopes = torch._softmax_backward_data(slopes, weights, -1, weights.dtype).mul_(scale)
            grads[0][at] = slopes @ key[at]
            grads[1][at] = slopes.t() @ query[at]
        return *grads, None, None, None


def _heads(
    query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, seed: int
) -> Iterator[tuple[tuple[int, int], Tensor, Tensor]]:
    """Yield each image and head, its attention weights [Q, K], and what dropout multiplies with."""
    generator = torch.Generator().manual_seed(seed)
    scale = query.shape[-1] ** -0.5
    for image in range(len(query)):
        for head in range(query.shape[1]):
            at = image, head
            logits = (query[at] @ key[at].t()).mul_(scale)
            if mask is not None:
                logits += mask[at]
            kept = torch.empty_like(logits).bernoulli_(1 - dropout, generator=generator)
            yield at, logits.softmax(-1), kept.div_(1 - dropout)

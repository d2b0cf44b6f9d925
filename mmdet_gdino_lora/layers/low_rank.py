"""``W x + scaling * b a x`` forward and backward: in few operations, and through the thin factors.

Autograd would form the gradient of ``W + scaling * b a``, a product as large as the layer itself.
Several inputs may share the weight, each with rows of its own, as an attention's query, key and
value share the packed projection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class FoldedLinear(torch.autograd.Function):
    """The factors are added to the weight, which is then one product per input: for float32."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        rows: Sequence[int],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute [..., rows of the weight] of every input [..., in_features]."""
        ctx.save_for_backward(weight, a, b, *inputs)
        ctx.scaling, ctx.rows = scaling, rows
        folded = torch.addmm(weight, b, a, alpha=scaling)
        return tuple(
            product(x, folded[part], None if bias is None else bias[part])
            for x, part in zip(inputs, parts(rows))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of the trained factors, of the inputs, and of a trained weight."""
        weight, a, b, *inputs = ctx.saved_tensors
        needs_weight, needs_bias, _, _, _, _, *needs = ctx.needs_input_grad
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        given = [x.reshape(-1, x.shape[-1]) for x in inputs]
        grad_inputs: list[Tensor | None] = [None] * len(inputs)
        if any(needs):
            folded = torch.addmm(weight, b, a, alpha=ctx.scaling)
            grad_inputs = [
                grad @ folded[part] if need else None
                for grad, part, need in zip(grads, parts(ctx.rows), needs)
            ]
        grad_a, grad_b = _factors_gradients(ctx, a, b, given, flat)
        grad_weight = grad_bias = None
        if needs_weight:
            grad_weight = torch.cat([grad.t() @ x for grad, x in zip(flat, given)])
        if needs_bias:
            grad_bias = torch.cat([grad.sum(0) for grad in flat])
        return grad_weight, grad_bias, grad_a, grad_b, None, None, *grad_inputs


class AddedLinear(torch.autograd.Function):
    """The factors' share is added to the product: for half precision, whose weights are too coarse.

    The weight is a frozen one. Everything but the factors, which have their own type, has the same
    type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        rows: Sequence[int],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """Compute [..., rows of the weight] of every input [..., in_features]."""
        ctx.types = a.dtype, b.dtype
        a, b = a.to(weight.dtype), b.to(weight.dtype)
        outs, inners = [], []
        for x, part in zip(inputs, parts(rows)):
            flat = x.reshape(-1, x.shape[-1])
            # F.linear itself: what an adapter of zeros gives is then the base's output, to the bit.
            out = F.linear(flat, weight[part], None if bias is None else bias[part])
            inner = flat @ a.t()
            out.addmm_(inner, b[part].t(), alpha=scaling)
            # No view to autograd: an activation may overwrite it in place.
            outs.append(torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]]))
            inners.append(inner)
        ctx.save_for_backward(weight, a, b, *inputs, *inners)
        ctx.scaling, ctx.rows = scaling, rows
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Give the gradients of the factors and of the inputs."""
        weight, a, b, *kept = ctx.saved_tensors
        inputs, inners = kept[: len(grads)], kept[len(grads) :]
        needs = ctx.needs_input_grad[6:]
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        given = [x.reshape(-1, x.shape[-1]) for x in inputs]
        thin = [grad @ b[part] for grad, part in zip(flat, parts(ctx.rows))]
        grad_inputs = [
            (grad @ weight[part]).addmm_(inner, a, alpha=ctx.scaling).view_as(x) if need else None
            for grad, part, inner, x, need in zip(flat, parts(ctx.rows), thin, inputs, needs)
        ]
        grad_a, grad_b = _factors_gradients(ctx, a, b, given, flat, inners, thin)
        if grad_a is not None:
            grad_a = grad_a.to(ctx.types[0])
        if grad_b is not None:
            grad_b = grad_b.to(ctx.types[1])
        return None, None, grad_a, grad_b, None, None, *grad_inputs


def parts(rows: Sequence[int]) -> Iterator[slice]:
    """Consecutive slices of these lengths; of everything where there is one."""
    if len(rows) == 1:
        yield slice(None)
        return
    end = 0
    for count in rows:
        yield slice(end, end + count)
        end += count


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Do what ``F.linear`` does, to the bit, with a result that is no view.

    An activation may overwrite it in place.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.
    """
    flat = x.reshape(-1, x.shape[-1])
    out = x.new_empty(*x.shape[:-1], len(weight))
    if bias is None:
        torch.mm(flat, weight.t(), out=out.view(len(flat), -1))
    else:
        torch.addmm(bias, flat, weight.t(), out=out.view(len(flat), -1))
    return out


def _factors_gradients(
    ctx: Any,
    a: Tensor,
    b: Tensor,
    inputs: Sequence[Tensor],
    grads: Sequence[Tensor],
    inners: Sequence[Tensor] = (),
    thin: Sequence[Tensor] = (),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a and b; ``inners`` are inputs times a, ``thin`` gradients times b."""
    scaling, slices = ctx.scaling, list(parts(ctx.rows))
    grad_a = grad_b = None
    if ctx.needs_input_grad[2]:
        thin = thin or [grad @ b[part] for grad, part in zip(grads, slices)]
        # beta=0: the first argument lends its shape, and its numbers aren't read
        grad_a = torch.addmm(a, thin[0].t(), inputs[0], beta=0, alpha=scaling)
        for inner, x in zip(thin[1:], inputs[1:]):
            grad_a.addmm_(inner.t(), x, alpha=scaling)
    if ctx.needs_input_grad[3]:
        inners = inners or [x @ a.t() for x in inputs]
        grad_b = torch.empty_like(b)
        for grad, inner, part in zip(grads, inners, slices):
            torch.addmm(b[part], grad.t(), inner, beta=0, alpha=scaling, out=grad_b[part])
    return grad_a, grad_b

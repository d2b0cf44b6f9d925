"""Autocast's casts of all adapters' trained factors are one operation, and back another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdet_gdino_lora.layers.frozen import autocast_type


class _Casts:
    """Casts of the running step by the factor's identity."""

    known: dict[int, Tensor] = {}


@contextmanager
def cast_together(factors: Sequence[Tensor]) -> Iterator[None]:
    """Within, `cast_factor` knows the factors in autocast's type; nothing is done without it.

    Args:
        factors: float32, on one device.
    """
    dtype = autocast_type(factors[0]) if factors else None
    if dtype is None:
        yield
        return
    casts = _CastTogether.apply(dtype, *factors)
    before = _Casts.known
    _Casts.known = {id(factor): cast for factor, cast in zip(factors, casts)}
    try:
        yield
    finally:
        _Casts.known = before


def cast_factor(factor: Tensor) -> Tensor:
    """Give a factor in autocast's type where it was cast with the others; else the factor.

    Args:
        factor: Of an adapter.
    """
    return _Casts.known.get(id(factor), factor)


class _CastTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a factor that isn't part of the loss gets no gradient
        casts = [torch.empty_like(factor, dtype=dtype) for factor in factors]
        torch._foreach_copy_(casts, list(factors))
        return tuple(casts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found = [grad for grad in grads if grad is not None]
        exact = [torch.empty_like(grad, dtype=torch.float32) for grad in found]
        if found:
            torch._foreach_copy_(exact, found)
        given = iter(exact)
        return None, *(None if grad is None else next(given) for grad in grads)

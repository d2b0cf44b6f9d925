"""Frozen weights are cast once for autocast, not in every step.

Autocast remembers casts of weights that need a gradient, and those within one step. A frozen
model's weights are most of what it casts, and are the same in every step.

What is remembered costs half of the float32 weights again, from the first step of training until
:func:`forget`; it is no part of the model (copies, state dicts and files hold nothing of it), and
is cast anew where a weight was written to, replaced or moved. Only writing through ``.data`` would
not be noticed: PEFT merges like that, but not while a model trains.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mmcv.cnn.bricks.wrappers as mmcv_layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary


class _Derived(NamedTuple):
    version: int
    storage: int
    key: Hashable
    value: Tensor


class _Memory:
    """What was made of weights, and whether there is to be more."""

    made: WeakIdKeyDictionary = WeakIdKeyDictionary()
    on = False


@contextmanager
def remembered() -> Iterator[None]:
    """Within, casts of frozen weights are remembered and used: for a step of training."""
    before, _Memory.on = _Memory.on, True
    try:
        yield
    finally:
        _Memory.on = before


def forget() -> None:
    """Gives the memory back; what is needed later is cast anew."""
    _Memory.made.clear()


def autocast_type(x: Tensor) -> torch.dtype | None:
    """Give the type in which autocast runs matrix products of a tensor; None where it doesn't."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def as_type(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a weight; the cast of a frozen one is remembered.

    Args:
        weight: A parameter.
        dtype: Of the result.

    Returns:
        The weight in that type: itself if it is of that type. Not to be written into.
    """
    if weight.dtype == dtype:
        return weight
    return derived(weight, dtype, lambda w: w.to(dtype))


def derived(weight: Tensor, key: Hashable, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Give a function of a weight; that of a frozen one is remembered.

    Args:
        weight: A parameter.
        key: Of the function; the last one is remembered.
        make: The function.

    Returns:
        Its value. Not to be written into.
    """
    if weight.requires_grad or not _Memory.on or torch.compiler.is_compiling():
        return make(weight)
    known: _Derived | None = _Memory.made.get(weight)
    now = (0 if weight.is_inference() else weight._version, weight.untyped_storage()._cdata, key)
    if known is None or known[:3] != now:
        with torch.inference_mode(False), torch.no_grad():  # training may come next
            known = _Derived(*now, make(weight.detach()))
        _Memory.made[weight] = known
    return known.value


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run ``F.linear``; under autocast with remembered weights.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features], a parameter.
        bias: [out_features] or None.
    """
    dtype = autocast_type(x)
    if dtype is None:
        return F.linear(x, weight, bias)
    return F.linear(x, as_type(weight, dtype), None if bias is None else as_type(bias, dtype))


class LeanLinear(nn.Linear):
    """This is ``nn.Linear``; under autocast it remembers the cast of a frozen weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Run the layer: [..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.bias)


class LeanMmcvLinear(mmcv_layers.Linear):
    """This is mmcv's ``Linear``, as `LeanLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the layer: [..., in_features] to [..., out_features]."""
        return linear(x, self.weight, self.bias)

"""A linear layer and its LoRA adapters are computed as one matrix product where that is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmdet_gdino_lora.layers.factors import cast_factor
from mmdet_gdino_lora.layers.frozen import as_type, autocast_type
from mmdet_gdino_lora.layers.low_rank import AddedLinear, FoldedLinear, parts
from mmdet_gdino_lora.peft_layers.adapter import Adapter, active_adapters, is_plain_lora
from mmdet_gdino_lora.peft_layers.layers import LoraLinear


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: list[Adapter]
) -> Tensor:
    """Run ``F.linear`` and add the adapters' share.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features], a parameter.
        bias: [out_features] or None.
        adapters: from `peft_layers.adapter.active_adapters`.

    Returns:
        [..., out_features]; equal to PEFT's within rounding.
    """
    return adapted_products([x], [len(weight)], weight, bias, adapters)[0]


def adapted_products(
    inputs: Sequence[Tensor],
    rows: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    adapters: list[Adapter],
) -> Sequence[Tensor]:
    """Run a linear layer whose rows are shared out to several inputs, adapters included.

    PEFT adds ``b(a(x))`` to the layer's output: two thin products and three more passes over the
    output, forward and backward. In float32 the delta is folded into the weight instead (it is as
    small as the weight, inputs are thousands of rows), which is one product. In lower precision the
    fold would round small deltas away: there the second thin product adds to the output while it is
    computed. Under adapter dropout, and where a weight trains as well, PEFT's way is taken.

    Args:
        inputs: [..., in_features] each.
        rows: how many of the weight's rows each input gets, in their order.
        weight: [out_features, in_features], a parameter.
        bias: [out_features] or None.
        adapters: from `peft_layers.adapter.active_adapters`.

    Returns:
        [..., rows] of each input; equal to PEFT's within rounding.
    """
    x = inputs[0]
    dtype = autocast_type(x)
    if not (adapters and _is_plain(inputs, weight, bias, adapters, dtype)):
        return _one_after_the_other(inputs, rows, weight, bias, adapters, dtype)
    if len(adapters) == 1:
        a, b, scaling, _ = adapters[0]
    else:
        a = torch.cat([adapter.a for adapter in adapters])
        b = torch.cat([adapter.b * adapter.scaling for adapter in adapters], dim=1)
        scaling = 1.0
    if dtype is None:
        return FoldedLinear.apply(weight, bias, a, b, scaling, tuple(rows), *inputs)
    weight, bias = as_type(weight, dtype), None if bias is None else as_type(bias, dtype)
    inputs = [x.to(dtype) for x in inputs]
    a, b = cast_factor(a), cast_factor(b)
    return AddedLinear.apply(weight, bias, a, b, scaling, tuple(rows), *inputs)


def _is_plain(
    inputs: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    adapters: list[Adapter],
    dtype: torch.dtype | None,
) -> bool:
    """Whether the products of `low_rank` know what is asked for."""
    if any(adapter.drops or adapter.a.dtype != torch.float32 for adapter in adapters):
        return False
    if dtype is None:
        return {x.dtype for x in inputs} == {weight.dtype} == {torch.float32}
    return not (weight.requires_grad or (bias is not None and bias.requires_grad))


def _one_after_the_other(
    inputs: Sequence[Tensor],
    rows: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    adapters: list[Adapter],
    dtype: torch.dtype | None,
) -> list[Tensor]:
    """Add each adapter's output to the layer's, as PEFT does."""
    if dtype is not None:
        weight, bias = as_type(weight, dtype), None if bias is None else as_type(bias, dtype)
        # All products run in this type: one cast serves them all, and is what they keep of x.
        inputs = [x.to(dtype) for x in inputs]
    outs = []
    for x, part in zip(inputs, parts(rows)):
        # Of an expanded input torch takes another product where a gradient is wanted than where
        # none is: in half precision the base and its adapters of zeros would differ.
        x = x.contiguous()
        out = F.linear(x, weight[part], None if bias is None else bias[part])
        for adapter in adapters:
            given = x if dtype is not None else x.to(adapter.a.dtype)
            inner = F.linear(adapter.dropout(given), adapter.a)
            out = out + (F.linear(inner, adapter.b[part]) * adapter.scaling).to(out.dtype)
        outs.append(out)
    return outs


class LeanLoraLinear(LoraLinear):
    """This is PEFT's ``lora.Linear`` with a plain adapter computed by `adapted_linear`.

    Everything else (DoRA and other variants, mixed batches, adapters with bias) is left to PEFT.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer with its active adapters.

        Args:
            x: [..., in_features].
            *args: PEFT's.
            **kwargs: PEFT's.

        Returns:
            [..., out_features].
        """
        base = self.base_layer
        if args or kwargs or not isinstance(base, nn.Linear) or not is_plain_lora(self):
            return super().forward(x, *args, **kwargs)
        return adapted_linear(x, base.weight, base.bias, active_adapters(self))

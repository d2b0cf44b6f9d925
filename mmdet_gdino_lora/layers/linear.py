"""A linear layer and its LoRA adapters are computed as one matrix product where that is exact."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmdet_gdino_lora.peft_layers.adapter import Adapter, active_adapters, is_plain_lora
from mmdet_gdino_lora.peft_layers.layers import LoraLinear


def adapted_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: list[Adapter]
) -> Tensor:
    """Run ``F.linear`` and add the adapters' share.

    PEFT adds ``b(a(x))`` to the layer's output: two thin products and two more passes over the
    output, forward and backward. In float32 the delta is folded into the weight instead (it is as
    small as the weight, inputs are thousands of rows), which is one product. In lower precision the
    fold would round small deltas away, and under adapter dropout it does not exist: both take
    PEFT's way.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features] or None.
        adapters: from `peft_layers.adapter.active_adapters`, possibly sliced by rows.

    Returns:
        [..., out_features]; equal to PEFT's within float32 rounding.
    """
    if not adapters:
        return F.linear(x, weight, bias)
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    folds = (
        x.dtype == weight.dtype == torch.float32
        and not autocast
        and not any(adapter.drops for adapter in adapters)
        and all(adapter.a.dtype == torch.float32 for adapter in adapters)
    )
    if folds:
        if len(adapters) == 1:
            a, b, scaling, _ = adapters[0]
        else:
            a = torch.cat([adapter.a for adapter in adapters])
            b = torch.cat([adapter.b * adapter.scaling for adapter in adapters], dim=1)
            scaling = 1.0
        return _FoldedLinear.apply(x, weight, bias, a, b, scaling)
    if autocast:
        # All products run in this type: one cast serves them all, and is what they keep of x.
        x = x.to(torch.get_autocast_dtype(device))
    out = F.linear(x, weight, bias)
    for adapter in adapters:
        given = x if autocast else x.to(adapter.a.dtype)
        inner = F.linear(adapter.dropout(given), adapter.a)
        out = out + (F.linear(inner, adapter.b) * adapter.scaling).to(out.dtype)
    return out


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


class _FoldedLinear(torch.autograd.Function):
    """This function is ``F.linear(x, weight + scaling * b @ a, bias)``.

    Autograd would form the gradient of the folded weight, a product as large as the layer itself.
    Here the backward pass goes through the thin factors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, a, b)
        ctx.scaling = scaling
        folded = torch.addmm(weight, b, a, alpha=scaling)
        if bias is None or not x.is_contiguous():
            return F.linear(x, folded, bias)
        # What F.linear does here, to the bit; but its result would be a view, which no activation
        # may overwrite in place.
        out = x.new_empty(*x.shape[:-1], len(weight))
        torch.addmm(bias, x.view(-1, x.shape[-1]), folded.t(), out=out.view(-1, len(weight)))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_a, needs_b, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = grad_a = grad_b = None
        if needs_x:
            grad_x = grad @ torch.addmm(weight, b, a, alpha=ctx.scaling)
        rows, grads = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        if needs_a:
            grad_a = (grads @ b).mul_(ctx.scaling).t() @ rows
        if needs_b:
            grad_b = grads.t() @ (rows @ a.t()).mul_(ctx.scaling)
        if needs_weight:
            grad_weight = grads.t() @ rows
        if needs_bias:
            grad_bias = grads.sum(0)
        return grad_x, grad_weight, grad_bias, grad_a, grad_b, None

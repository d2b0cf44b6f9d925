"""Attention and dropout as on CUDA: one kernel each way, where the CPU takes several steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.virtual_device.memory import Place, place_of, put
from tests.virtual_device.operations import DeviceError, Operations

#: Of a bias's rows, in numbers, for the memory-efficient kernel; others are copied.
ALIGNMENT = 16

sdpa = F.scaled_dot_product_attention
dropout = F.dropout


class CudaFunctions:
    """``scaled_dot_product_attention`` and ``dropout`` for tensors of the virtual device."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Torch's, by its fused kernels."""
        more = dict(dropout_p=dropout_p, is_causal=is_causal, scale=scale, **kwargs)
        if place_of(query) is not Place.DEVICE:
            return sdpa(query, key, value, attn_mask, **more)
        if torch.is_autocast_enabled('cuda'):
            dtype = torch.get_autocast_dtype('cuda')
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
            if attn_mask is not None and attn_mask.is_floating_point():
                attn_mask = attn_mask.to(dtype)
        if attn_mask is not None:
            attn_mask = _as_bias(attn_mask, query.dtype)
            aligned = all(stride % ALIGNMENT == 0 for stride in attn_mask.stride()[:-1])
            if not aligned or attn_mask.stride(-1) != 1:
                size = attn_mask.shape[-1]
                attn_mask = F.pad(attn_mask, (0, ALIGNMENT - size % ALIGNMENT))[..., :size]
        return _Attention.apply(self._operations, more, query, key, value, attn_mask)

    def dropout(
        self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        """Torch's, by its fused kernel."""
        if place_of(input) is Place.DEVICE and training and 0 < p < 1 and not inplace:
            return torch.native_dropout(input, p, True)[0]
        return dropout(input, p, training, inplace)


def _as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    barred = torch.full((), float('-inf'), dtype=dtype, device=mask.device)
    return torch.where(mask, 0.0, barred)


def _heads_inside(x: Tensor) -> Tensor:
    """Lays numbers out as CUDA's kernels do, whose results' heads lie inside their positions."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operations: Operations, more: dict, *given: Tensor | None) -> Tensor:
        places = {place_of(tensor) for tensor in given if tensor is not None}
        if places != {Place.DEVICE}:
            raise DeviceError('Expected query, key, value and mask to be on the same device')
        operations.launch('scaled_dot_product_attention')
        with operations.paused(), torch.enable_grad(), torch.autocast('cpu', enabled=False):
            inputs = [
                None if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(given, ctx.needs_input_grad[2:])
            ]
            out = sdpa(*inputs, **more)
            result = _heads_inside(out.detach())
        ctx.operations, ctx.inputs, ctx.out = operations, inputs, out
        ctx.save_for_backward(*given, result)  # what CUDA's kernels keep, for those who count it
        put(result, Place.DEVICE)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.operations.launch('scaled_dot_product_attention_backward')
        wanted = [x for x in ctx.inputs if x is not None and x.requires_grad]
        with ctx.operations.paused():
            found = iter(torch.autograd.grad(ctx.out, wanted, grad, retain_graph=True))
            grads = [
                _heads_inside(next(found)) if x is not None and x.requires_grad else None
                for x in ctx.inputs
            ]
        for result in grads:
            if result is not None:
                put(result, Place.DEVICE)
        return None, None, *grads

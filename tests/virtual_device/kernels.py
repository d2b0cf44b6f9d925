"""mmcv's deformable attention as its CUDA extension offers it, computed on the CPU.

It asks of its arguments what ``ms_deform_attn_cuda.cu`` of mmcv 2.1 asks.
"""

from __future__ import annotations

import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from torch import Tensor


class Kernels:
    """Stands in for mmcv's compiled extension; its autograd function around it stays."""

    calls = 0

    def _check(self, numbers: list[Tensor], shapes: Tensor, starts: Tensor, step: int) -> None:
        dtype = numbers[0].dtype
        if dtype not in (torch.float32, torch.float64, torch.float16):
            name = str(dtype).removeprefix('torch.')
            raise NotImplementedError(f'"ms_deform_attn" not implemented for {name!r}')
        if {tensor.dtype for tensor in numbers} != {dtype}:
            raise RuntimeError('ms_deform_attn: expected scalar types to be the same')
        if not shapes.dtype == starts.dtype == torch.int64:
            raise RuntimeError('ms_deform_attn: sizes and starts of levels have to be int64')
        if not all(tensor.is_contiguous() for tensor in [*numbers, shapes, starts]):
            raise RuntimeError('ms_deform_attn: tensors have to be contiguous')
        batch = len(numbers[0])
        if batch % min(batch, step):
            raise RuntimeError(f'batch({batch}) must divide im2col_step({min(batch, step)})')
        self.calls += 1

    def ms_deform_attn_forward(
        self,
        value: Tensor,
        shapes: Tensor,
        starts: Tensor,
        locations: Tensor,
        weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """The extension's forward pass."""
        numbers = [value, locations, weights]
        self._check(numbers, shapes, starts, im2col_step)
        return self._compute(*numbers, shapes).to(value.dtype)

    def ms_deform_attn_backward(
        self,
        value: Tensor,
        shapes: Tensor,
        starts: Tensor,
        locations: Tensor,
        weights: Tensor,
        slopes: Tensor,
        *grads: Tensor,
        im2col_step: int,
    ) -> None:
        """The extension's backward pass, which writes into the last three tensors."""
        numbers = [value, locations, weights]
        self._check([*numbers, slopes, *grads], shapes, starts, im2col_step)
        with torch.enable_grad():
            inputs = [tensor.detach().requires_grad_() for tensor in numbers]
            out = self._compute(*inputs, shapes)
        for grad, result in zip(grads, torch.autograd.grad(out, inputs, slopes.to(out.dtype))):
            grad.copy_(result)

    def _compute(self, value: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor) -> Tensor:
        exact = torch.promote_types(value.dtype, torch.float32)
        numbers = (tensor.to(exact) for tensor in (locations, weights))
        return multi_scale_deformable_attn_pytorch(value.to(exact), shapes.tolist(), *numbers)

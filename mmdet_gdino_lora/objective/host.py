"""The step's one way to the host and back: the matching is solved there."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from mmdet_gdino_lora.objective import cpu


def to_host(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Numpy arrays of tensors by one transfer and one wait for the device.

    Args:
        tensors: By name, on one device. Numbers must be exact in float32, or on the CPU.

    Returns:
        Arrays of the same names and shapes; from other devices than the CPU all are float32.
    """
    first = next(iter(tensors.values()))
    if cpu.runs_here(first):
        return {name: tensor.detach().numpy() for name, tensor in tensors.items()}
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors.values()])
    if flat.is_cuda:
        staged = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        staged.copy_(flat, non_blocking=True)
        torch.cuda.current_stream(flat.device).synchronize()
    else:
        staged = flat.cpu()
    parts = staged.split([tensor.numel() for tensor in tensors.values()])
    return {
        name: part.view(tensor.shape).numpy()
        for part, (name, tensor) in zip(parts, tensors.items())
    }

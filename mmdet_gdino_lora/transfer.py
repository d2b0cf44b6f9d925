"""Whatever the host computes for the device goes there from here."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_device(data: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Upload without waiting for the device.

    From ordinary memory the copy to a GPU starts when the GPU has done all work that it was given
    before, and the host stands still until then; from pinned memory it is work like other work.
    Each copy has its price all the same: put together what belongs together.

    Args:
        data: on the host; an array on the CPU is not copied.
        device: where it is needed.

    Returns:
        The same numbers there.
    """
    tensor = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if device.type != 'cuda':
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

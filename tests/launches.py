"""Counts the operations that a device would be asked for."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

from tests.virtual_device.operations import Kind


class Launches(TorchDispatchMode):
    """Counts what would launch a kernel, also where tensors have no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind = Kind.of(function)
        if kind.launches:
            self.counts[kind.name] += 1
        return function(*args, **(kwargs or {}))

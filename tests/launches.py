"""Counts the operations that a device would be asked for."""

from __future__ import annotations

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

#: They describe or reserve memory, or make a scalar on the host.
FREE = {
    '_unsafe_view',
    'alias',
    'detach',
    'empty',
    'empty_like',
    'lift_fresh',
    'new_empty',
    'promote_types',
    'scalar_tensor',
}


class Launches(TorchDispatchMode):
    """Counts what would launch a kernel: every operation that is neither a view nor free."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split('::')[1]
        returns_view = any(
            alias.alias_info is not None and not alias.alias_info.is_write
            for alias in function._schema.returns
        )
        if not returns_view and name not in FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))

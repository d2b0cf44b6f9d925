"""Lets ``torch.load(weights_only=True)`` read mmengine's checkpoints, and nothing more than that.

From 2.6 on, torch refuses to unpickle types it doesn't know, and mmengine's checkpoints carry
three: the log's ``HistoryBuffer``, and the numpy arrays and scalars inside it. They are allowed
here, one by one. ``HistoryBuffer`` also pickles references to its own methods by way of
``getattr``; what is allowed in its place answers for those four methods alone, so that a crafted
file gains no way to reach anything else.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_HISTORY_METHODS = ('min', 'max', 'current', 'mean')


def _history_method(owner: Any, name: str) -> Callable:
    """What ``getattr`` means inside a checkpoint: one of HistoryBuffer's four statistics."""
    if owner is not HistoryBuffer or name not in _HISTORY_METHODS:
        raise ValueError(f'a checkpoint may not ask for attribute {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)


def allow_mmengine_checkpoints() -> None:
    """Adds mmengine's few checkpoint types to torch's list of safe globals, for this process."""
    multiarray = (getattr(np, '_core', None) or np.core).multiarray
    # A dtype is an instance of its own class, which torch checks as well.
    codes = np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'
    dtypes = {type(np.dtype(code)) for code in codes}
    # numpy 2 renamed numpy.core; files written under either name are read under both.
    renamed = [
        (getattr(multiarray, function), f'numpy.{core}.multiarray.{function}')
        for core in ('core', '_core')
        for function in ('_reconstruct', 'scalar')
    ]
    history = [HistoryBuffer, (_history_method, 'builtins.getattr')]
    torch.serialization.add_safe_globals([*history, np.ndarray, np.dtype, *renamed, *dtypes])

"""The few types of mmengine's checkpoints that ``torch.load(weights_only=True)`` may read.

From 2.6 on, torch refuses to unpickle types it doesn't know, and mmengine's checkpoints carry
three: the log's ``HistoryBuffer``, and the numpy arrays and scalars inside it. They are allowed
one by one, and only while a file of ours is read: what else the process loads is told apart as
strictly as before. Two of the functions that such files call by name could do more than these
files need, and are answered for by narrower ones, so that a crafted file gains no way to reach
anything else: ``getattr``, with which ``HistoryBuffer`` refers to its own methods, and numpy's
``_reconstruct``, which begins every array empty.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_HISTORY_METHODS = ('min', 'max', 'current', 'mean')
# torch's list is the process's: one scope is not to close while another thread is reading.
_LOCK = threading.RLock()


def _history_method(owner: Any, name: str) -> Callable:
    """What ``getattr`` means inside a checkpoint: one of HistoryBuffer's four statistics."""
    if owner is not HistoryBuffer or name not in _HISTORY_METHODS:
        raise ValueError(f'a checkpoint may not ask for attribute {name!r} of {owner!r}')
    return getattr(HistoryBuffer, name)


def _empty_array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """What numpy's ``_reconstruct`` means inside a checkpoint: an array that is filled next."""
    if kind is not np.ndarray or shape != (0,) or code not in (b'b', 'b'):
        raise ValueError(f'a checkpoint may not ask for an array of shape {shape!r}')
    return np.ndarray((0,), 'b')


@contextmanager
def mmengine_types() -> Iterator[None]:
    """Within, ``torch.load(weights_only=True)`` also reads mmengine's few checkpoint types.

    Yields:
        Nothing.
    """
    with _LOCK:
        # What somebody allowed on their own would be gone when torch's scope ends.
        already = torch.serialization.get_safe_globals()
        allowed = [entry for entry in _allowed() if entry not in already]
        with torch.serialization.safe_globals(allowed):
            yield


def _allowed() -> list[Any]:
    multiarray = (getattr(np, '_core', None) or np.core).multiarray
    # A dtype is an instance of its own class, which torch checks as well.
    codes = np.typecodes['AllInteger'] + np.typecodes['Float'] + '?'
    dtypes = {type(np.dtype(code)) for code in codes}
    # numpy 2 renamed numpy.core; files written under either name are read under both.
    renamed = [
        (function, f'numpy.{core}.multiarray.{name}')
        for core in ('core', '_core')
        for name, function in (('_reconstruct', _empty_array), ('scalar', multiarray.scalar))
    ]
    history = [HistoryBuffer, (_history_method, 'builtins.getattr')]
    return [*history, np.ndarray, np.dtype, *renamed, *dtypes]

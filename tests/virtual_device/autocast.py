"""``torch.autocast('cuda')`` for tensors that say that they are on a GPU and lie on the CPU.

The CPU's autocast does the work, with what CUDA's casts to float32 added. CUDA's lists are read
from torch's own header.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

HEADER = Path(torch.__file__).parent / 'include' / 'ATen' / 'autocast_mode.h'
HALF = (torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def cuda_lists() -> dict[str, list[str]]:
    """Operations that run in float32, and those whose result does, as ``name.overload``."""
    text = HEADER.read_text(encoding='utf-8')
    lists = {}
    for name in ('FP32', 'FP32_SET_OPT_DTYPE'):
        body = re.search(rf'#define AT_FORALL_{name}\(_\)((?:.*\\\n)*.*)', text)
        assert body is not None, 'torch has moved its lists'
        found = re.findall(r'_\((\w+)(?:, (\w+))?\)', body[1])
        lists[name] = [f'{op}.{overload}' if overload else op for op, overload in found]
    return lists


def _overload(name: str) -> Any:
    op, _, overload = name.partition('.')
    return getattr(getattr(torch.ops.aten, op), overload or 'default')


def _in_float32(op: Any) -> Callable:
    def cast(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype in HALF else x

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _without_autocast():
            return op(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel


def _to_float32(op: Any) -> Callable:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        if isinstance(args[0], Tensor) and args[0].dtype in HALF and kwargs.get('dtype') is None:
            kwargs['dtype'] = torch.float32
        with _without_autocast():
            return op(*args, **kwargs)

    return kernel


def _without_autocast() -> Any:
    return torch._C._ExcludeDispatchKeyGuard(
        torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    )


def _known(device: Any) -> Any:
    return 'cpu' if device == 'cuda' else device


@contextmanager
def mapped_autocast() -> Iterator[None]:
    """CUDA's autocast is the CPU's, with CUDA's lists of what runs in float32."""
    init = torch.autocast.__init__
    enabled, dtype, available = (
        torch.is_autocast_enabled,
        torch.get_autocast_dtype,
        torch.amp.is_autocast_available,
    )

    def mapped_init(self: Any, device_type: str, dtype: Any = None, *args: Any, **kw: Any) -> None:
        if device_type == 'cuda' and dtype is None:
            dtype = torch.float16
        init(self, _known(device_type), dtype, *args, **kw)

    library = torch.library.Library('aten', 'IMPL', 'AutocastCPU')
    for kind, way in (('FP32', _in_float32), ('FP32_SET_OPT_DTYPE', _to_float32)):
        for name in cuda_lists()[kind]:
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f'aten::{name}', 'AutocastCPU'):
                library.impl(name, way(_overload(name)))
    with (
        mock.patch.object(torch.autocast, '__init__', mapped_init),
        mock.patch.object(
            torch, 'is_autocast_enabled', lambda d=None: enabled(_known(d or 'cuda'))
        ),
        mock.patch.object(torch, 'get_autocast_dtype', lambda d: dtype(_known(d))),
        mock.patch.object(torch.amp, 'is_autocast_available', lambda d: available(_known(d))),
    ):
        try:
            yield
        finally:
            library._destroy()

"""How much memory adapters take, known before they are built: Linux ends who asks for too much."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Optional

from peft import LoraConfig
from torch import nn

from mmdet_gdino_lora.checks.findings import Finding

IN_TRAINING = 4
"""Copies of a trained weight: itself, its gradient and the two moments of Adam."""


def check_size(config: LoraConfig, modules: Mapping[str, nn.Module]) -> Iterator[Finding]:
    """Compares what adapters will take with the memory that is free.

    Args:
        config: The adapter's config.
        modules: Those that are to get it, by name.

    Yields:
        What was found.
    """
    takes, free = 4 * num_weights(config, modules), free_memory()
    if free is None or IN_TRAINING * takes < free:
        return
    needs = f'{_gib(takes)}, {_gib(IN_TRAINING * takes)} in training'
    yield Finding(
        f'model.lora.r={config.r}: adapters of this rank on {len(modules)} modules take {needs}, '
        f'and {_gib(free)} of memory are free; choose a smaller rank or fewer modules',
        fatal=takes > free,
    )


def num_weights(config: LoraConfig, modules: Mapping[str, nn.Module]) -> int:
    """Counts an adapter's weights.

    Args:
        config: The adapter's config.
        modules: Those that are to get it, by name.

    Returns:
        The number of elements of its factors.
    """
    return sum(_rank(config, name) * _width(module) for name, module in modules.items())


def free_memory() -> Optional[int]:
    """Finds out how much memory the process may still take.

    Returns:
        Bytes, of the machine or of the control group, whichever is less; None where neither says.
    """
    found = [
        _number('/proc/meminfo', r'MemAvailable:\s+(\d+)', 1024),
        _less(_number('/sys/fs/cgroup/memory.max'), _number('/sys/fs/cgroup/memory.current')),
    ]
    return min((value for value in found if value is not None), default=None)


def _number(path: str, pattern: str = r'(\d+)', unit: int = 1) -> Optional[int]:
    if not os.path.isfile(path):
        return None
    with open(path, encoding='utf-8') as file:
        found = re.search(pattern, file.read())
    return int(found[1]) * unit if found else None  # a group without a limit says 'max'


def _less(limit: Optional[int], used: Optional[int]) -> Optional[int]:
    return None if limit is None or used is None else limit - used


def _rank(config: LoraConfig, name: str) -> int:
    patterns = (config.rank_pattern or {}).items()
    return next((r for p, r in patterns if re.match(rf'(.*\.)?({p})$', name)), config.r)


def _width(module: nn.Module) -> int:
    """Elements of both factors for each unit of rank."""
    if isinstance(module, nn.MultiheadAttention):  # packed projection, and output
        return 6 * module.embed_dim
    if isinstance(module, nn.Conv2d):
        kernel = module.kernel_size[0] * module.kernel_size[1]
        return module.in_channels // module.groups * kernel + module.out_channels
    if isinstance(module, nn.Embedding):
        return module.num_embeddings + module.embedding_dim
    return int(module.in_features) + int(module.out_features)  # type: ignore[arg-type]


def _gib(size: int) -> str:
    return f'{size / 2**30:.3g} GiB'

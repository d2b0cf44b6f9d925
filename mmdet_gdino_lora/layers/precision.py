"""Frozen weights can be kept in half the bytes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Optional

import torch
from torch import nn

from mmdet_gdino_lora.errors import ConfigError

DTYPES = {'float32': None, 'bfloat16': torch.bfloat16}


def base_dtype(name: str) -> Optional[torch.dtype]:
    """Find the type that frozen weights are kept in.

    Args:
        name: ``'float32'`` or ``'bfloat16'``.

    Returns:
        None for float32: nothing to change.

    Raises:
        ConfigError: For any other name. float16 is none of them: published bases hold weights that
            fall below its smallest number.
    """
    if name not in DTYPES:
        raise ConfigError(f'model.base_dtype={name!r} is not one of {", ".join(DTYPES)}.')
    return DTYPES[name]


def cast_frozen(model: nn.Module, dtype: torch.dtype) -> None:
    """Keep the frozen matrices of a model in another type; what trains and all norms stay.

    The model has to run under autocast from then on, see :func:`autocast`.

    Args:
        model: With its trainable parameters known.
        dtype: For the frozen weights of linear, convolution, embedding and attention layers.
    """
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.MultiheadAttention)
    for module in model.modules():
        if isinstance(module, kinds):
            for parameter in module.parameters(recurse=False):
                if parameter.dim() > 1 and not parameter.requires_grad:
                    parameter.data = parameter.data.to(dtype)


@contextmanager
def autocast(device: torch.device, dtype: Optional[torch.dtype]) -> Iterator[None]:
    """Mix precisions for a model with cast weights, unless the runner has set its own.

    Args:
        device: Of the model.
        dtype: Of the frozen weights; None does nothing.
    """
    if dtype is None or torch.is_autocast_enabled(device.type):
        yield
    else:
        with torch.autocast(device.type, dtype=dtype):
            yield


def as_autocast(tensor: torch.Tensor) -> torch.Tensor:
    """Take a weight of one half type to the other where that one is autocast's.

    torch joins tensors of different types under autocast, but not of two half types: frozen
    weights in bfloat16 meet float16 wherever a run has mmdet's ``--amp``.

    Args:
        tensor: Of any type.

    Returns:
        Itself; in autocast's type if it is in half precision and autocast is on.
    """
    kind = tensor.device.type
    if tensor.dtype not in (torch.bfloat16, torch.float16) or not torch.is_autocast_enabled(kind):
        return tensor
    return tensor.to(torch.get_autocast_dtype(kind))

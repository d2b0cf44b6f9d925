"""Names of a detector's tensors, with adapters and without."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import Tensor, nn

ADAPTER = 'default'
"""PEFT's name of the adapter that is trained."""

LABEL_EMBEDDING = 'dn_query_generator.label_embedding.weight'
"""The one weight whose shape depends on the number of classes; only training reads it."""

IMAGE_TOWER = {'backbone', 'neck'}
"""Parts of a detector that make the image features."""


def base_name(name: str) -> str:
    """A parameter's name in the plain detector, from its name in the injected one.

    Args:
        name: Such as ``decoder.layers.0.self_attn.attn.base_layer.out_proj.base_layer.weight``.

    Returns:
        Such as ``decoder.layers.0.self_attn.attn.out_proj.weight``; an adapter's own parameters
        only lose the ``base_layer`` above them.
    """
    return name.replace('.base_layer.', '.')


def is_factor(name: str, adapter: str = '') -> bool:
    """Whether a name is that of an adapter's weight.

    Args:
        name: Of a parameter.
        adapter: Name of the adapter; empty for any.
    """
    if '.lora_' not in name:
        return False
    return not adapter or f'.{adapter}.' in name or name.endswith(f'.{adapter}')


def trained_factors(detector: nn.Module) -> list[Tensor]:
    """The low-rank factors of linear and attention layers that are trained, in float32.

    Args:
        detector: The detector, injected or not.
    """
    return [
        parameter
        for name, parameter in detector.named_parameters()
        if ('.lora_A.' in name or '.lora_B.' in name)
        and parameter.requires_grad
        and parameter.dim() == 2
        and parameter.dtype == torch.float32
    ]


def places(detector: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Where a detector's parameters and persistent buffers are.

    Args:
        detector: The detector, injected or not.

    Returns:
        Module and key of every tensor, by its name.
    """
    found: dict[str, tuple[nn.Module, str]] = {}
    for prefix, module in detector.named_modules(remove_duplicate=False):
        passing = module._non_persistent_buffers_set
        buffers = {key: b for key, b in module._buffers.items() if key not in passing}
        for key, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                found[f'{prefix}.{key}' if prefix else key] = module, key
    return found


def named_tensors(detector: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, whatever a state dict of the detector leaves out.

    Args:
        detector: The detector, injected or not.

    Returns:
        The detector's tensors, not copies, under the names that they have in it.
    """
    found = places(detector).items()
    return {name: getattr(module, key).detach() for name, (module, key) in found}


def plain_tensors(detector: nn.Module) -> dict[str, Tensor]:
    """As :func:`named_tensors`, under the names that the tensors have without adapters.

    Args:
        detector: The detector, injected or not.

    Returns:
        The detector's tensors, not copies; adapters are left out.
    """
    tensors = named_tensors(detector).items()
    return {base_name(name): tensor for name, tensor in tensors if not is_factor(name)}


def buffers_beside(detector: nn.Module, names: Container[str]) -> set[str]:
    """Persistent buffers of the modules that hold one of these parameters themselves.

    Args:
        detector: The detector, injected or not.
        names: Names of parameters in it.

    Returns:
        Names of buffers in it, such as the running statistics of a norm whose weight is trained.
    """
    found = places(detector)
    holders = {id(module) for name, (module, _) in found.items() if name in names}
    return {
        name
        for name, (module, key) in found.items()
        if id(module) in holders and key in module._buffers
    }

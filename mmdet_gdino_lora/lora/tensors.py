"""Names of a detector's tensors, with adapters and without."""

from __future__ import annotations

from torch import Tensor, nn

LABEL_EMBEDDING = 'dn_query_generator.label_embedding.weight'
"""The one weight whose shape depends on the number of classes; only training reads it."""


def base_name(name: str) -> str:
    """A parameter's name in the plain detector, from its name in the injected one.

    Args:
        name: Such as ``decoder.layers.0.self_attn.attn.base_layer.out_proj.base_layer.weight``.

    Returns:
        Such as ``decoder.layers.0.self_attn.attn.out_proj.weight``; an adapter's own parameters
        only lose the ``base_layer`` above them.
    """
    return name.replace('.base_layer.', '.')


def own_tensors(detector: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, whatever a state dict of the detector leaves out.

    Args:
        detector: The detector, injected or not.

    Returns:
        The detector's own tensors, not copies, under their own names.
    """
    tensors: dict[str, Tensor] = {}
    for prefix, module in detector.named_modules(remove_duplicate=False):
        passing = module._non_persistent_buffers_set
        buffers = {key: b for key, b in module._buffers.items() if key not in passing}
        for key, tensor in {**module._parameters, **buffers}.items():
            if tensor is not None:
                tensors[f'{prefix}.{key}' if prefix else key] = tensor.detach()
    return tensors


def plain_tensors(detector: nn.Module) -> dict[str, Tensor]:
    """As :func:`own_tensors`, under the names that the tensors have without adapters.

    Args:
        detector: The detector, injected or not.

    Returns:
        The detector's own tensors, not copies; adapters are left out.
    """
    own = own_tensors(detector)
    return {base_name(name): tensor for name, tensor in own.items() if '.lora_' not in name}

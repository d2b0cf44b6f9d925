"""The layers that PEFT puts in: telling them apart, finding them, switching their adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

__all__ = [
    'BaseTunerLayer',
    'LoraLayer',
    'LoraLinear',
    'adapter_layers',
    'every_adapter_layer',
    'enable',
    'is_adapted',
    'set_active',
    'without_adapter',
]


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's layers, around a layer of the base.

    Args:
        module: Any module.
    """
    return isinstance(module, BaseTunerLayer)


def without_adapter(module: nn.Module) -> nn.Module:
    """The base's layer inside one of PEFT's, or the module itself.

    Args:
        module: Any module.
    """
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def every_adapter_layer(model: nn.Module) -> Iterator[tuple[str, BaseTunerLayer]]:
    """PEFT's layers with their names, those inside an adapted attention included.

    Args:
        model: With or without adapters.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapter_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Adapted modules by name.

    Args:
        model: With or without adapters.

    Returns:
        PEFT's layers; the output projection inside an adapted attention module counts as part of
        that module and is left out.
    """
    return {n: layer for n, layer in every_adapter_layer(model) if '.base_layer.' not in n}


def set_active(layer: BaseTunerLayer, adapters: Sequence[str]) -> None:
    """Chooses the adapters that act when the layer is enabled; which ones train stays as it is.

    PEFT's own ``set_adapter`` makes what it activates trainable and freezes the rest.

    Args:
        layer: One of PEFT's layers.
        adapters: Names of adapters that it has.
    """
    layer._active_adapter = list(adapters)


def enable(layer: BaseTunerLayer, enabled: bool) -> None:
    """Lets a layer's active adapters act or not; which ones train stays as it is.

    Args:
        layer: One of PEFT's layers.
        enabled: False for the base alone.
    """
    # A plain entry, past nn.Module's __setattr__, which looks for parameters first:
    # distillation sets hundreds of these twice in a step.
    vars(layer)['_disable_adapters'] = not enabled

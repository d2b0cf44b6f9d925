"""Putting PEFT's layers into a model and taking adapters out again."""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from mmdet_gdino_lora.peft_layers.attention import FrozenMultiheadAttention
from mmdet_gdino_lora.peft_layers.layers import every_adapter_layer


def insert(config: LoraConfig, model: nn.Module, adapter: str) -> None:
    """Puts an adapter on the modules that a config names.

    Attention gets :class:`~.attention.FrozenMultiheadAttention` instead of PEFT's own class.

    Args:
        config: With ``target_modules``.
        model: With or without other adapters.
        adapter: Name of the new one.

    Raises:
        Exception: PEFT's own, of many kinds, where a layer can't carry such an adapter.
    """
    config._register_custom_module({nn.MultiheadAttention: FrozenMultiheadAttention})
    inject_adapter_in_model(config, model, adapter_name=adapter)


def take_out(model: nn.Module, adapter: str) -> None:
    """Deletes an adapter; PEFT's layers stay, also where it was the only one.

    Args:
        model: With adapters.
        adapter: Name of the one to delete.
    """
    for _, layer in every_adapter_layer(model):
        if adapter in layer.scaling:
            layer.delete_adapter(adapter)


def matches(config: LoraConfig, name: str) -> bool:
    """Whether PEFT would put an adapter on the module of this name.

    Args:
        config: With ``target_modules`` and what narrows them.
        name: Dotted name.
    """
    return bool(check_target_module_exists(config, name))


def reads_base(config: LoraConfig) -> bool:
    """Whether an adapter's initial values depend on the weights that it is put on.

    Args:
        config: The adapter's config.

    Returns:
        True for DoRA, PiSSA, OLoRA and the like.
    """
    initial = config.init_lora_weights
    return (
        config.use_dora
        or getattr(config, 'kasa_config', None) is not None  # not in every PEFT
        or (isinstance(initial, str) and initial.lower() != 'gaussian')
    )

"""What PEFT's LoRA layers add to a layer now, read from their insides in one place."""

from __future__ import annotations

from typing import NamedTuple

from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn


class Adapter(NamedTuple):
    """One active adapter: the layer's weight is ``W + scaling * b @ a``.

    Attributes:
        a: [r, in_features].
        b: [out_features, r].
        scaling: ``alpha / r``, or ``alpha / sqrt(r)`` with rsLoRA.
        dropout: applied to the adapter's input while training.
    """

    a: Tensor
    b: Tensor
    scaling: float
    dropout: nn.Module

    @property
    def drops(self) -> bool:
        """Whether the dropout acts now."""
        return self.dropout.training and getattr(self.dropout, 'p', 0.0) > 0


def active_adapters(layer: nn.Module) -> list[Adapter]:
    """The adapters that a layer must add to its own weight now.

    Empty for a layer without adapters, with adapters disabled, and with adapters merged (its own
    weight holds them then). As in PEFT, disabling merged adapters first takes them out again.
    """
    if not isinstance(layer, LoraLayer):
        return []
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return []
    if layer.merged:
        return []
    return [
        Adapter(
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            layer.lora_dropout[name],
        )
        for name in layer.active_adapters
        if name in layer.lora_A
    ]


def is_plain_lora(layer: LoraLayer) -> bool:
    """Whether a LoRA layer is ``W + scaling * b @ a`` and nothing more (no DoRA, no own bias)."""
    return not layer.lora_variant and not any(layer.lora_bias.values())

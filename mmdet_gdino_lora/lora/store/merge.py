"""Adapters folded into the base, at any strength between the base and the tuned model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor, nn

from mmdet_gdino_lora.lora.state import lora_state
from mmdet_gdino_lora.lora.store.base import base_of, unrounded
from mmdet_gdino_lora.lora.tensors import (
    LABEL_EMBEDDING,
    base_name,
    is_factor,
    named_tensors,
    plain_tensors,
)
from mmdet_gdino_lora.peft_layers.attention import FrozenMultiheadAttention
from mmdet_gdino_lora.peft_layers.layers import adapter_layers

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


@torch.no_grad()
def merged_weights(
    detector: nn.Module, scale: float = 1.0, base: Optional[Mapping[str, Tensor]] = None
) -> dict[str, Tensor]:
    """Makes weights of a plain detector that detects as the tuned one does.

    Between 0 and 1 every weight, also those trained without adapters, lies on the line from the
    base to the tuned model, which trades the new task against what the model knew (WiSE-FT,
    https://arxiv.org/abs/2109.01903).

    Args:
        detector: Tuned.
        scale: 0 is the base, bit for bit; 1 the tuned model.
        base: The base's weights, by plain name; read again from its file where None.

    Returns:
        Tensors under mmdet's names, on the CPU, in float32 also where the detector keeps its base
        in half precision.

    Raises:
        ConfigError: If the base is needed and not to be found.
    """
    tensors = plain_tensors(detector)
    labels_missing = LABEL_EMBEDDING not in tensors and lora_state(detector).base is not None
    if base is None and (scale != 1 or labels_missing):
        base = base_of(detector)
    tuned = unrounded(detector, tensors, base)
    for name, layer in adapter_layers(detector).items():
        tuned.update(_merged_layer(name, layer, tuned))
    known = base or {}  # at scale 1 nobody may have asked for it
    if labels_missing and LABEL_EMBEDDING in known:
        tuned[LABEL_EMBEDDING] = known[LABEL_EMBEDDING].float()
    if scale == 1:
        return tuned
    return {
        name: _between(known[name], tensor, scale)
        if name in known and known[name].shape == tensor.shape
        else tensor
        for name, tensor in tuned.items()
    }


def _merged_layer(name: str, layer: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adds a layer's active adapters to its weights in float32.

    In the base's half precision most of an adapter is lost: bfloat16 keeps 8 bits of the sum, and
    adapters are small beside what they are added to.
    """
    copied: LoraLayer = copy.deepcopy(layer).float()
    for key, tensor in named_tensors(copied).items():
        if not is_factor(f'{name}.{key}'):
            tensor.copy_(weights[base_name(f'{name}.{key}')])
    if isinstance(copied, FrozenMultiheadAttention):
        packed, output = copied.effective_weights(list(copied.active_adapters))
        merged = {'in_proj_weight': packed, 'out_proj.weight': output}
    else:
        copied.merge(safe_merge=True)
        merged = dict(copied.get_base_layer().named_parameters())
    return {f'{name}.{key}': tensor.detach().cpu() for key, tensor in merged.items()}


def _between(base: Tensor, tuned: Tensor, scale: float) -> Tensor:
    if scale == 0 or not tuned.is_floating_point():
        return (base if scale < 1 else tuned).to(tuned.dtype)
    return torch.lerp(base.float(), tuned.float(), scale).to(tuned.dtype)

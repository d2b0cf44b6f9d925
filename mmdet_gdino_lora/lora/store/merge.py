"""Adapters folded into the base, at any strength between the base and the tuned model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Optional

import torch
from torch import Tensor, nn

from mmdet_gdino_lora.lora.state import lora_state
from mmdet_gdino_lora.lora.store.base import base_of
from mmdet_gdino_lora.lora.tensors import LABEL_EMBEDDING, plain_tensors
from mmdet_gdino_lora.peft_layers.attention import FrozenMultiheadAttention
from mmdet_gdino_lora.peft_layers.layers import adapter_layers


@torch.no_grad()
def merged_weights(
    detector: nn.Module, scale: float = 1.0, base: Optional[Mapping[str, Tensor]] = None
) -> dict[str, Tensor]:
    """Weights of a plain detector that detects as the tuned one does.

    Between 0 and 1 every weight, also those trained without adapters, lies on the line from the
    base to the tuned model, which trades the new task against what the model knew (WiSE-FT,
    https://arxiv.org/abs/2109.01903).

    Args:
        detector: Tuned.
        scale: 0 is the base, bit for bit; 1 the tuned model.
        base: The base's own weights, by plain name; read again from its file where None.

    Returns:
        Tensors under mmdet's names, on the CPU.

    Raises:
        ConfigError: If the base is needed and not to be found.
    """
    tuned = {name: tensor.cpu().clone() for name, tensor in plain_tensors(detector).items()}
    for name, layer in adapter_layers(detector).items():
        for key, tensor in _merged_layer(layer).items():
            tuned[f'{name}.{key}'] = tensor.cpu()
    if scale == 1 and (LABEL_EMBEDDING in tuned or not lora_state(detector).base):
        return tuned
    base = base_of(detector) if base is None else base
    tuned.setdefault(LABEL_EMBEDDING, base[LABEL_EMBEDDING])
    if scale == 1:
        return tuned
    return {
        name: _between(base[name], tensor, scale)
        if name in base and base[name].shape == tensor.shape
        else tensor
        for name, tensor in tuned.items()
    }


def _merged_layer(layer: nn.Module) -> dict[str, Tensor]:
    if isinstance(layer, FrozenMultiheadAttention):
        packed, output = layer.effective_weights(list(layer.active_adapters))
        return {'in_proj_weight': packed, 'out_proj.weight': output}
    layer = copy.deepcopy(layer)
    layer.merge(safe_merge=True)
    return dict(layer.get_base_layer().named_parameters())


def _between(base: Tensor, tuned: Tensor, scale: float) -> Tensor:
    if scale == 0 or not tuned.is_floating_point():
        return (base if scale < 1 else tuned).to(tuned.dtype)
    return torch.lerp(base.float(), tuned.float(), scale).to(tuned.dtype)

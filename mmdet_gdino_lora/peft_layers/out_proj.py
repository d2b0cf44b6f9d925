"""PEFT's double count of an attention's output projection, measured on the installed PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Optional

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@lru_cache(maxsize=1)
def peft_out_proj_factor() -> int:
    """How many times the installed PEFT adds the adapter of an attention's output projection.

    PEFT (seen in 0.21) merges that adapter twice for each forward, once in the attention's own
    ``merge`` and once in the one of its output projection, so that the delta counts double. An
    adapter trained here has to mean the same in PEFT (merging, exporting, loading elsewhere), so
    its number is taken from PEFT itself, on a layer of a few weights.
    """
    with torch.random.fork_rng(devices=[]), torch.device('cpu'), torch.no_grad():
        model = nn.ModuleDict({'attn': nn.MultiheadAttention(2, 1)})
        inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, target_modules=['attn']), model)
        attn: LoraLayer = model['attn']
        out_proj = attn.base_layer.out_proj
        before = out_proj.base_layer.weight.sum()
        out_proj.lora_A['default'].weight.fill_(1.0)
        out_proj.lora_B['default'].weight.fill_(1.0)
        attn.merge()
        return round(float(out_proj.base_layer.weight.sum() - before) / 4)


def in_todays_count(weights: Mapping[str, Tensor], factor: Optional[int]) -> dict[str, Tensor]:
    """Keeps the meaning of adapters that were trained under another PEFT's count.

    Args:
        weights: Of adapters and others, by name in the injected model.
        factor: What :func:`peft_out_proj_factor` was then; None where it isn't known.

    Returns:
        The same weights, those of attention output adapters rescaled where the counts differ.
    """
    today = peft_out_proj_factor()
    if factor in (None, today):
        return dict(weights)
    return {
        name: value * (factor / today) if '.base_layer.out_proj.lora_B.' in name else value
        for name, value in weights.items()
    }

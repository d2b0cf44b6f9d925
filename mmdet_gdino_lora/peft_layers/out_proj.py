"""PEFT's double count of an attention's output projection, measured on the installed PEFT."""

from __future__ import annotations

from functools import lru_cache

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


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
        attn = model['attn']
        out_proj = attn.base_layer.out_proj
        before = out_proj.base_layer.weight.sum()
        out_proj.lora_A['default'].weight.fill_(1.0)
        out_proj.lora_B['default'].weight.fill_(1.0)
        attn.merge()
        return round(float(out_proj.base_layer.weight.sum() - before) / 4)

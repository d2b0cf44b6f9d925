"""Single layers with adapters, and the gradients that tests compare."""

from __future__ import annotations

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn


def with_adapters(module: nn.Module, targets: list[str], names=('default',), **fields) -> nn.Module:
    """The module with adapters that do something."""
    torch.manual_seed(1)
    for name in names:
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, **fields)
        inject_adapter_in_model(config, module, adapter_name=name)
    for key, parameter in sorted(module.named_parameters()):
        if 'lora_' in key:
            nn.init.normal_(parameter, std=0.1)
    return module


def gradients(module: nn.Module, out: torch.Tensor) -> dict[str, torch.Tensor]:
    module.zero_grad()
    torch.manual_seed(2)
    (out * torch.randn_like(out)).sum().backward()
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}

"""Gradient checkpointing that works with frozen layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def trains(module: nn.Module) -> bool:
    """Whether a module has a parameter that gets a gradient."""
    return any(parameter.requires_grad for parameter in module.parameters())


def run_checkpointed(module: nn.Module, **inputs: Any) -> Any:
    """``module(**inputs)``; what it would keep for the backward pass is computed again there.

    Never re-entrant: re-entrant checkpointing stores no graph where the inputs need no gradient,
    and parameters inside then get none, silently. Where no gradient can flow through the module at
    all, it simply runs.
    """
    flows = torch.is_grad_enabled() and (
        any(isinstance(value, Tensor) and value.requires_grad for value in inputs.values())
        or trains(module)
    )
    if not flows:
        return module(**inputs)
    return checkpoint(module, use_reentrant=False, **inputs)

"""Gradient checkpointing works with frozen layers here, and costs nothing where nothing trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def gradient_flows(module: nn.Module, *inputs: Any) -> bool:
    """Whether a backward pass will go through ``module(*inputs)``."""
    return torch.is_grad_enabled() and (
        any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        or any(parameter.requires_grad for parameter in module.parameters())
    )


def run_checkpointed(module: nn.Module, **inputs: Any) -> Any:
    """Run ``module(**inputs)``, and again in the backward pass instead of keeping its activations.

    Never re-entrant: re-entrant checkpointing stores no graph where the inputs need no gradient,
    and parameters inside then get none, silently. Where no gradient flows through the module, it
    simply runs.
    """
    if not gradient_flows(module, *inputs.values()):
        return module(**inputs)

    # By position: what is kept for the backward pass is then known to torch as such.
    def run(*values: Any) -> Any:
        return module(**dict(zip(inputs, values)))

    return checkpoint(run, *inputs.values(), use_reentrant=False)

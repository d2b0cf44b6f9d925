"""Gradient checkpointing that works with frozen layers, and costs nothing where nothing trains."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.backbones.swin import SwinBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def gradient_flows(module: nn.Module, *inputs: Any) -> bool:
    """Whether a backward pass will go through ``module(*inputs)``."""
    return torch.is_grad_enabled() and (
        any(isinstance(value, Tensor) and value.requires_grad for value in inputs)
        or any(parameter.requires_grad for parameter in module.parameters())
    )


def run_checkpointed(module: nn.Module, **inputs: Any) -> Any:
    """``module(**inputs)``; what it would keep for the backward pass is computed again there.

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


class CheckpointedSwinBlock(SwinBlock):
    """mmdet's Swin block, checkpointed as in `run_checkpointed`."""

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """As mmdet's.

        Args:
            x: [B, H * W, C].
            hw_shape: (H, W).

        Returns:
            [B, H * W, C].
        """
        if not gradient_flows(self, x):
            return super().forward(x, hw_shape)
        return checkpoint(super().forward, x, hw_shape, use_reentrant=False)


def mend_checkpointing(backbone: nn.Module) -> None:
    """Exchange the re-entrant checkpointing (``with_cp=True``) of a Swin backbone's blocks.

    Args:
        backbone: any; what is not a checkpointing Swin block stays as it is.
    """
    for block in backbone.modules():
        if type(block) is SwinBlock and block.with_cp:
            block.with_cp = False
            block.__class__ = CheckpointedSwinBlock

"""The heads' branches, one for each decoder layer, run for all layers together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet_gdino_lora.layers.contrastive import TokenLogits
from mmdet_gdino_lora.layers.frozen import LeanLinear, LeanMmcvLinear

LINEAR = (nn.Linear, LeanLinear, LeanMmcvLinear)


def all_boxes(branches: Iterable[nn.Module], hidden: Tensor) -> Tensor:
    """Run each layer's box branch on that layer's queries.

    Branches of plain linear layers are one product for every step of theirs, over all layers.

    Args:
        branches: L modules, [B, Q, C] to [B, Q, 4]; further ones are left out.
        hidden: [L, B, Q, C].

    Returns:
        [L, B, Q, 4].
    """
    of_layers: list[Any] = [branch for branch, _ in zip(branches, hidden)]
    steps = list(zip(*of_layers)) if all(isinstance(b, nn.Sequential) for b in of_layers) else []
    if not steps or not all(_together(step) for step in steps):
        return torch.stack([branch(layer) for branch, layer in zip(of_layers, hidden.unbind())])
    # Weights from the left, queries as columns: their gradients then come as they lie in memory.
    x = hidden.flatten(1, 2).transpose(1, 2)
    for step in steps:
        if isinstance(step[0], nn.ReLU):
            x = x.relu()
        else:
            weight = torch.stack([layer.weight for layer in step])
            bias = torch.stack([layer.bias for layer in step])
            x = torch.baddbmm(bias[:, :, None], weight, x)
    return x.transpose(1, 2).unflatten(1, hidden.shape[1:3])


def _together(step: Sequence[nn.Module]) -> bool:
    """Whether the layers' modules of one step compute the same in one product."""
    kinds = {type(module) for module in step}
    if kinds == {nn.ReLU}:
        return True
    return kinds <= set(LINEAR) and all(module.bias is not None for module in step)


def all_logits(
    branches: Iterable[nn.Module], hidden: Tensor, text: Tensor, text_token_mask: Tensor
) -> Tensor:
    """Score each layer's queries for every token by that layer's branch.

    Args:
        branches: L modules or more, in mmdet's form.
        hidden: [L, B, Q, C].
        text: [B, T, C].
        text_token_mask: bool [B, T], False: padding.

    Returns:
        [L, B, Q, T], -inf at padding.
    """
    of_layers: list[Any] = [branch for branch, _ in zip(branches, hidden)]
    if not all(isinstance(b, TokenLogits) and b.scales_alike(of_layers[0]) for b in of_layers):
        layers = zip(of_layers, hidden.unbind())
        return torch.stack([branch(layer, text, text_token_mask) for branch, layer in layers])
    first = of_layers[0]
    logits = first.products(hidden, text)
    if first.bias is not None:
        logits = logits + torch.stack([branch.bias for branch in of_layers])[:, None, None]
    return logits.masked_fill(~text_token_mask[:, None], float('-inf'))

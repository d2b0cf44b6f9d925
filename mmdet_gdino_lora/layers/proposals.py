"""The encoder's positions whose best token logit is largest become queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.layers.contrastive import TokenLogits
from mmdet_gdino_lora.layers.levels import host_shapes


class Proposals(NamedTuple):
    """These are the selected positions, best first.

    Attributes:
        logits: [B, K, T], -inf at padding.
        boxes: [B, K, 4] as (cx, cy, w, h) before the sigmoid.
        positions: int64 [B, K], which of the encoder's S positions they are.
    """

    logits: Tensor
    boxes: Tensor
    positions: Tensor


def select_proposals(
    memory: Tensor,
    memory_mask: Tensor | None,
    spatial_shapes: Tensor,
    memory_text: Tensor,
    text_token_mask: Tensor,
    *,
    transform: Callable[[Tensor], Tensor],
    classify: TokenLogits,
    regress: Callable[[Tensor], Tensor],
    num_queries: int,
    positions: Tensor | None = None,
) -> Proposals:
    """Select in two stages, with the results of mmdet's ``GroundingDINO.pre_decoder``.

    mmdet transforms, classifies and regresses all positions with gradient and then gathers the
    ``num_queries`` best. Each position is treated alone, so here only their ranking looks at all
    of them, without gradient, and the rest is computed for the selected.

    Args:
        memory: [B, S, C] encoded image features.
        memory_mask: bool [B, S], True: padding; None without padding.
        spatial_shapes: int64 [levels, 2].
        memory_text: [B, T, C] encoded text.
        text_token_mask: bool [B, T], False: padding.
        transform: row by row [..., C] to [..., C]; mmdet's ``memory_trans_fc`` and ``_norm``.
        classify: the encoder's classification branch.
        regress: row by row [..., C] to [..., 4]; the encoder's box branch.
        num_queries: K.
        positions: int64 [B, K], to select these rather than the best.

    Raises:
        ConfigError: If there are fewer positions than ``num_queries``.
    """
    if memory.shape[1] < num_queries:
        raise ConfigError(
            f'num_queries={num_queries} is more than the {memory.shape[1]} positions that the '
            'encoder has for images of this size: use larger images or fewer queries'
        )
    boxes, valid = position_boxes(spatial_shapes, memory_mask, memory.device)
    if memory_mask is not None:
        valid = valid & ~memory_mask
    memory = memory * valid[..., None]
    if positions is None:
        with torch.no_grad():
            scores = classify.best(transform(memory), memory_text, text_token_mask)
            positions = scores.topk(num_queries, dim=1).indices
        # Older torch hands on casts of weights made without gradient to what needs one.
        torch.clear_autocast_cache()
    selected = positions[..., None]
    memory = transform(memory.gather(1, selected.expand(-1, -1, memory.shape[-1])))
    boxes = boxes.expand(memory.shape[0], -1, -1).gather(1, selected.expand(-1, -1, 4))
    logits = classify(memory, memory_text, text_token_mask)
    return Proposals(logits, regress(memory) + boxes, positions)


def position_boxes(
    spatial_shapes: Tensor, memory_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Give each position a box (Deformable DETR, A.4): centred there, larger on coarser levels.

    Args:
        spatial_shapes: int64 [levels, 2].
        memory_mask: bool [B, S], True: padding; None without padding.
        device: where the results belong.

    Returns:
        [B or 1, S, 4] as (cx, cy, w, h) before the sigmoid, inf where there is no valid box, and
        bool [B or 1, S]: whether there is one.
    """
    boxes, begin = [], 0
    for level, (height, width) in enumerate(host_shapes(spatial_shapes)):
        y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
        x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
        if memory_mask is None:
            y, x = (y / height)[None], (x / width)[None]
        else:
            seen = ~memory_mask[:, begin : begin + height * width].view(-1, height, width)
            y = y / seen[:, :, 0].sum(1, keepdim=True)
            x = x / seen[:, 0].sum(1, keepdim=True)
        grid = torch.stack(
            (x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1
        ).flatten(1, 2)
        boxes.append(torch.cat((grid, torch.full_like(grid, 0.05 * 2.0**level)), dim=-1))
        begin += height * width
    box = torch.cat(boxes, dim=1)
    valid = ((box > 0.01) & (box < 0.99)).all(-1)
    box = torch.log(box / (1 - box)).masked_fill_(~valid[..., None], float('inf'))
    if memory_mask is not None:
        box = box.masked_fill_(memory_mask[..., None], float('inf'))
    return box, valid

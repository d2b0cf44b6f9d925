"""The encoder's positions whose best token logit is largest become queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.layers.contrastive import TokenLogits
from mmdet_gdino_lora.layers.levels import Shapes, centres, grid, host_shapes


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
    shapes, device = host_shapes(spatial_shapes), memory.device
    if not all(isinstance(length, int) for shape in shapes for length in shape):
        boxes, valid = _boxes_of_any_size(shapes, device)
    elif memory_mask is None:
        boxes, valid = _unpadded_boxes(shapes, device)
    else:
        boxes, valid = position_boxes(shapes, memory_mask, device)
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


def _boxes_of_any_size(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `position_boxes` without padding; sizes are expressions, as in an exported graph."""
    boxes = []
    for level, (height, width) in enumerate(shapes):
        places = centres(height, width, device)[None]
        boxes.append(torch.cat((places, torch.full_like(places, 0.05 * 2.0**level)), dim=-1))
    return _before_sigmoid(torch.cat(boxes, dim=1))


def _before_sigmoid(box: Tensor) -> tuple[Tensor, Tensor]:
    valid = ((box > 0.01) & (box < 0.99)).all(-1)
    return torch.log(box / (1 - box)).masked_fill_(~valid[..., None], float('inf')), valid


@lru_cache(maxsize=32)
def _unpadded_boxes(shapes: Shapes, device: torch.device) -> tuple[Tensor, Tensor]:
    """Remember what depends on the sizes alone, 17 bytes a position."""
    with torch.inference_mode(False), torch.no_grad():  # training may come next
        return position_boxes(shapes, None, device)


def position_boxes(
    shapes: Shapes, memory_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Give each position a box (Deformable DETR, A.4): centred there, larger on coarser levels.

    Args:
        shapes: (height, width) of each level.
        memory_mask: bool [B, S], True: padding; None without padding.
        device: where the results belong.

    Returns:
        [B or 1, S, 4] as (cx, cy, w, h) before the sigmoid, inf where there is no valid box, and
        bool [B or 1, S]: whether there is one.
    """
    places = grid(shapes, device)
    sizes = places.sizes[None] if memory_mask is None else _seen_sizes(shapes, memory_mask)
    middles = places.centres / sizes.index_select(1, places.level)
    extents = (0.05 * 2.0 ** torch.arange(len(shapes), device=device)).index_select(0, places.level)
    extents = extents[None, :, None].expand_as(middles)
    box, valid = _before_sigmoid(torch.cat((middles, extents), dim=-1))
    if memory_mask is not None:
        box = box.masked_fill_(memory_mask[..., None], float('inf'))
    return box, valid


def _seen_sizes(shapes: Shapes, memory_mask: Tensor) -> Tensor:
    """Count the columns and rows of each level that show the image: float32 [B, levels, 2]."""
    sums, begin, seen = [], 0, ~memory_mask
    for height, width in shapes:
        level = seen[:, begin : begin + height * width].view(-1, height, width)
        sums += [level[:, 0].sum(1), level[:, :, 0].sum(1)]
        begin += height * width
    return torch.stack(sums, dim=1).view(-1, len(shapes), 2)

"""Images that were encoded alone become one padded batch; an image's own padding is cut off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdet_gdino_lora.frozen.store import Shapes, View
from mmdet_gdino_lora.layers.levels import host_shapes, level_tensors
from mmdet_gdino_lora.transformer import Encoded

if TYPE_CHECKING:
    from mmdet_gdino_lora.transformer import LeanGroundingDINO


def unpadded(
    memory: Tensor, mask: Optional[Tensor], spatial_shapes: Tensor
) -> tuple[Tensor, Shapes]:
    """Cuts off the padding of images of one size.

    Args:
        memory: Of the encoder [B, N, C].
        mask: True at padding [B, N], the same for all images; None without padding.
        spatial_shapes: Height and width of every level [levels, 2].

    Returns:
        [B, S, C], and height and width of every level of what is left.
    """
    shapes = host_shapes(spatial_shapes)
    if mask is None:
        return memory, shapes
    kept = ~mask[0]
    rectangles = [level.view(shape) for level, shape in zip(_levels(kept, shapes), shapes)]
    sizes = [(int(level[:, 0].sum()), int(level[0].sum())) for level in rectangles]
    return memory[:, kept], tuple(sizes)


def pack(
    detector: LeanGroundingDINO, views: Sequence[View], text_token_masks: Sequence[Tensor]
) -> list[Encoded]:
    """Makes a batch of views.

    Args:
        detector: Computes the valid ratios.
        views: One per image, on one device.
        text_token_masks: Of the captions that they were encoded under, True at tokens [B, T].

    Returns:
        What the decoder starts from, in float32, under each of the captions.
    """
    all_shapes = [view.shapes for view in views]
    encoded = []
    decoder_inputs: dict[str, Any] = {}
    for number, text_token_mask in enumerate(text_token_masks):
        encodings = [view.encodings[number] for view in views]
        levels, masks = _padded([e.memory for e in encodings], all_shapes)
        memory = torch.cat([level.flatten(1, 2) for level in levels], 1)
        if not decoder_inputs:
            decoder_inputs = _decoder_inputs(detector, levels, masks)
        length = text_token_mask.shape[1]
        texts = [F.pad(e.memory_text, (0, 0, 0, length - len(e.memory_text))) for e in encodings]
        outputs = dict(
            memory=memory,
            memory_mask=decoder_inputs['memory_mask'],
            spatial_shapes=decoder_inputs['spatial_shapes'],
            memory_text=torch.stack(texts).float(),
            text_token_mask=text_token_mask,
        )
        encoded.append(Encoded(outputs, decoder_inputs))
    return encoded


def _levels(flat: Tensor, shapes: Shapes) -> Sequence[Tensor]:
    return flat.split([height * width for height, width in shapes])


def _padded(
    memories: Sequence[Tensor], all_shapes: Sequence[Shapes]
) -> tuple[list[Tensor], Optional[list[Tensor]]]:
    """Every level [B, H, W, C], and True at its padding [B, H, W]; None where nothing is padded."""
    if len(set(all_shapes)) == 1:
        stacked = torch.stack(list(memories)).float()
        sizes = [height * width for height, width in all_shapes[0]]
        levels = stacked.split(sizes, 1)
        return [level.unflatten(1, shape) for level, shape in zip(levels, all_shapes[0])], None
    first = memories[0]
    padded, masks = [], []
    for shapes in zip(*all_shapes):
        size = (len(memories), max(h for h, _ in shapes), max(w for _, w in shapes))
        padded.append(first.new_zeros((*size, first.shape[-1]), dtype=torch.float32))
        masks.append(first.new_ones(size, dtype=torch.bool))
    for image, (memory, shapes) in enumerate(zip(memories, all_shapes)):
        parts = _levels(memory, shapes)
        for level, mask, part, (height, width) in zip(padded, masks, parts, shapes):
            level[image, :height, :width] = part.view(height, width, -1)
            mask[image, :height, :width] = False
    return padded, masks


def _decoder_inputs(
    detector: LeanGroundingDINO, levels: Sequence[Tensor], masks: Optional[Sequence[Tensor]]
) -> dict[str, Any]:
    """As ``pre_transformer`` makes them of a padded batch."""
    spatial_shapes, level_start_index = level_tensors([level.movedim(3, 1) for level in levels])
    if masks is None:
        valid_ratios = levels[0].new_ones(len(levels[0]), len(levels), 2)
        mask = None
    else:
        valid_ratios = torch.stack([detector.get_valid_ratio(level) for level in masks], 1)
        mask = torch.cat([level.flatten(1) for level in masks], 1)
    return dict(
        memory_mask=mask,
        spatial_shapes=spatial_shapes,
        level_start_index=level_start_index,
        valid_ratios=valid_ratios,
    )

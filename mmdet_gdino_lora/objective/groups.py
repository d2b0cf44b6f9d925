"""Predictions as the objective sees them: layers whose queries get their targets in one way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet_gdino_lora.errors import NonFiniteError
from mmdet_gdino_lora.objective.focal import background_focal
from mmdet_gdino_lora.objective.targets import Targets


@dataclass
class Group:
    """L layers that share the batch, the number of queries and the tokens.

    Attributes:
        suffixes: Of the layers' loss names.
        names: What an error calls each layer.
        logits: [L, B, Q, C] token logits. Columns from T on are padding.
        boxes: [L, B, Q, 4] as (cx, cy, w, h) in 0..1.
        mask: bool [B, T], True for valid tokens.
        spans: bool [N, T], the valid tokens of each target of the batch.
        objectness: Whether the only token is objectness, which every target spans.
        dn_groups: Number of denoising groups; 0 for queries that are matched.
        distances: L1 and GIoU [L, N, Q] of every target and query, where they are known already.
        background: Under ``(alpha, gamma)``, the focal loss [L, B, Q] of calling every valid token
            background, as far as it is known already.
    """

    suffixes: Sequence[str]
    names: Sequence[str]
    logits: Tensor
    boxes: Tensor
    mask: Tensor
    spans: Tensor
    objectness: bool = False
    dn_groups: int = 0
    distances: tuple[Tensor, Tensor] | None = None
    background: dict[tuple[float, float], Tensor] = field(default_factory=dict)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.logits.shape[2]

    def background_sums(self, alpha: float, gamma: float) -> Tensor:
        """The focal loss [L, B, Q] of calling every valid token background."""
        key = (alpha, gamma)
        if key not in self.background:
            self.background[key], _ = background_focal(self.logits, self.mask, *key, False)
        return self.background[key]

    def finiteness(self) -> Tensor:
        """[2, L, B], finite where the logits and the boxes of a layer and image are."""
        sums = next(iter(self.background.values())).sum(2).float()
        return torch.stack((sums, self.boxes.detach().sum((2, 3), dtype=torch.float32)))

    def check_finite(self, values: np.ndarray) -> None:
        """Raise for the first layer and image with NaN or infinite predictions.

        Args:
            values: The host's :meth:`finiteness`.
        """
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            kind, layer, image = bad[0]
            what = ('pred_logits', 'pred_boxes')[kind]
            raise NonFiniteError(
                f'{what} of {self.names[layer]}, image '
                f'{image} of the batch, hold NaN or infinite values: the training has diverged; '
                'lower the learning rate, clip gradients, or use bfloat16 instead of float16',
                where=f'{what} of {self.names[layer]}',
                images=tuple(np.flatnonzero(~np.isfinite(values[kind, layer])).tolist()),
            )


def decoder_group(outputs: Mapping[str, Any], targets: Targets) -> Group:
    """All decoder layers, the last one last."""
    stacked = outputs.get('decoder_outputs')
    if stacked is None:
        layers = [*(outputs.get('aux_outputs') or ()), outputs]
        stacked = {
            key: torch.stack([layer[key] for layer in layers])
            for key in ('pred_logits', 'pred_boxes')
        }
    suffixes = _numbered(len(stacked['pred_logits']))
    names = [f'decoder layer {i}' for i in range(len(suffixes))]
    return _group(suffixes, names, stacked, targets)


def encoder_group(outputs: Mapping[str, Any], targets: Targets, enc_target: str) -> Group:
    """The encoder's proposals."""
    layer = {key: outputs['enc_outputs'][key][None] for key in ('pred_logits', 'pred_boxes')}
    group = _group(['_enc'], ['the encoder'], layer, targets)
    if enc_target == 'objectness':
        group.objectness = True
        group.logits = objectness(group.logits[0], targets.mask)[None]
        group.mask = targets.mask.new_ones((len(targets.mask), 1))
        group.spans = targets.mask.new_ones((len(targets.spans), 1))
    return group


def denoising_group(outputs: Mapping[str, Any], targets: Targets) -> Group:
    """The denoising queries of all decoder layers."""
    stacked = outputs['dn_outputs']
    suffixes = [f'_dn{suffix}' for suffix in _numbered(len(stacked['pred_logits']))]
    names = [f'the denoising queries of decoder layer {i}' for i in range(len(suffixes))]
    group = _group(suffixes, names, stacked, targets)
    group.dn_groups = int(stacked['num_groups'])
    return group


def objectness(logits: Tensor, mask: Tensor) -> Tensor:
    """The largest valid token logit of each proposal, [B, Q, 1], with gradient to that one.

    Args:
        logits: [B, Q, C], C at least T.
        mask: [B, T] bool, True for valid tokens. An image without any has -inf.
    """
    valid = logits.detach()[..., : mask.shape[1]].masked_fill(~mask[:, None], -torch.inf)
    largest = logits.gather(-1, valid.argmax(dim=-1, keepdim=True))
    return largest.masked_fill(~mask.any(dim=1)[:, None, None], -torch.inf)


def _group(
    suffixes: Sequence[str], names: Sequence[str], layers: Mapping[str, Tensor], targets: Targets
) -> Group:
    logits, boxes = layers['pred_logits'], layers['pred_boxes']
    return Group(suffixes, names, logits, boxes, targets.mask, targets.spans)


def _numbered(count: int) -> list[str]:
    """Layers carry their number, and the last one, which predicts, none."""
    return [*(f'_{i}' for i in range(count - 1)), '']

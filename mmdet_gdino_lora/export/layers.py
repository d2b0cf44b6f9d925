"""Layers as an exported graph computes them, and their exchange.

What differs is how, not what: sizes come from the input, and sampling is ``grid_sample``, ONNX's
``GridSample``. ``layers/exchange.py`` does the same for training.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.layers.transformer.utils import PatchEmbed, PatchMerging
from torch import Tensor, nn

from mmdet_gdino_lora.export.swin import GraphPatchEmbed, GraphPatchMerging, GraphWindowAttention
from mmdet_gdino_lora.layers.contrastive import TokenLogits
from mmdet_gdino_lora.layers.deformable import LeanDeformableAttention
from mmdet_gdino_lora.layers.encoder import LeanEncoder
from mmdet_gdino_lora.layers.levels import Shapes, centres
from mmdet_gdino_lora.layers.swin import LeanShiftWindowMSA


class GraphDeformableAttention(LeanDeformableAttention):
    """This is mmcv's ``MultiScaleDeformableAttention``, one ``grid_sample`` per level."""

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Any = None,
        level_start_index: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Sample the levels around each query's reference point.

        Args:
            query: [B, Q, C].
            key: ignored, as in mmcv.
            value: [B, S, C], the flattened levels; the query where None.
            identity: added to the output; the query where None.
            query_pos: added to the query.
            key_padding_mask: ignored: the images of a graph's batch have one size.
            reference_points: [B, Q, levels, 2 or 4] in 0..1: centres, or centres and sizes.
            spatial_shapes: (height, width) of every level.
            level_start_index: ignored.
            **kwargs: ignored, as in mmcv.

        Returns:
            [B, Q, C].
        """
        assert reference_points is not None
        identity = query if identity is None else identity
        value = self.value_proj(query if value is None else value)
        query = query if query_pos is None else query + query_pos
        batch, queries = query.shape[0], query.shape[1]
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, levels, points, 2))
        weights = self.attention_weights(query).unflatten(-1, (heads, -1)).softmax(-1)
        weights = weights.unflatten(-1, (levels, points))
        sums, begin = [], 0
        for level, (height, width) in enumerate(spatial_shapes):
            features = value[:, begin : begin + height * width].transpose(1, 2)
            features = features.reshape(batch * heads, -1, height, width)
            begin = begin + height * width
            places = _places(offsets[:, :, :, level], reference_points[:, :, level], height, width)
            grid = (2 * places - 1).transpose(1, 2).reshape(batch * heads, queries, points, 2)
            samples = F.grid_sample(features, grid, align_corners=False)
            shares = weights[:, :, :, level].transpose(1, 2)
            sums.append((samples * shares.reshape(batch * heads, 1, queries, points)).sum(-1))
        out = torch.stack(sums).sum(0).view(batch, -1, queries).transpose(1, 2)
        return self.output_proj(out) + identity


def _places(offsets: Tensor, reference_points: Tensor, height: int, width: int) -> Tensor:
    """Compute the points p + dp of one level, (x, y) in 0..1: [B, Q, heads, points, 2]."""
    reference_points = reference_points[:, :, None, None]
    if reference_points.shape[-1] == 2:
        x, y = offsets.unbind(-1)
        return reference_points + torch.stack((x / width, y / height), -1)
    centres, sizes = reference_points.split(2, dim=-1)
    return centres + offsets * (sizes * (0.5 / offsets.shape[-2]))


class GraphEncoder(LeanEncoder):
    """This encoder's reference points are expressions of the levels' sizes."""

    @staticmethod
    def get_encoder_reference_points(
        spatial_shapes: Any, valid_ratios: Tensor, device: torch.device | str
    ) -> Tensor:
        """Compute the centres of all positions.

        Args:
            spatial_shapes: (height, width) of every level.
            valid_ratios: ones, for nothing is padded.
            device: where the result belongs.

        Returns:
            [1, S, levels, 2], (x, y) in 0..1.
        """
        places = torch.cat([centres(height, width, device) for height, width in spatial_shapes])
        return places[None, :, None] * valid_ratios[:, None]


class GraphTokenLogits(TokenLogits):
    """These logits exist for all positions at a time: a graph has no loop over their number."""

    @torch.no_grad()
    def best(self, visual_feat: Tensor, text_feat: Tensor, text_token_mask: Tensor) -> Tensor:
        """Find the largest token logit of every position.

        Args:
            visual_feat: [B, S, C].
            text_feat: [B, T, C].
            text_token_mask: bool [B, T].

        Returns:
            [B, S].
        """
        return self(visual_feat, text_feat, text_token_mask).amax(-1)


GRAPH: dict[type[nn.Module], type[nn.Module]] = {
    PatchEmbed: GraphPatchEmbed,
    PatchMerging: GraphPatchMerging,
    LeanShiftWindowMSA: GraphWindowAttention,
    LeanDeformableAttention: GraphDeformableAttention,
    LeanEncoder: GraphEncoder,
    TokenLogits: GraphTokenLogits,
}
"""What stands in for each layer in a graph."""


def exchange_for_graph(module: nn.Module) -> None:
    """Let a built detector's layers compute as a graph of any image size can.

    The layers stay the same objects with the same parameters.

    Args:
        module: a `LeanGroundingDINO` without adapters.
    """
    for child in module.modules():
        if type(child) in GRAPH:
            child.__class__ = GRAPH[type(child)]


def level_shapes(feats: Any) -> Shapes:
    """Give the sizes of feature maps as expressions of the input's.

    Args:
        feats: [B, C, H, W], one per level.

    Returns:
        (height, width) of each.
    """
    return tuple((feat.shape[-2], feat.shape[-1]) for feat in feats)

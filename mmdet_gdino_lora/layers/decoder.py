"""Grounding DINO's decoder turns the denoising mask into a bias once, not once per layer."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerDecoder
from torch import Tensor, nn

from mmdet_gdino_lora.layers.bias import as_bias
from mmdet_gdino_lora.layers.refinement import before_sigmoid
from mmdet_gdino_lora.layers.sine import encode_boxes


class LeanDecoder(GroundingDinoTransformerDecoder):
    """This decoder equals mmdet's in arguments, parameters, names and results.

    It does not call mmdet's own forward: that of OneDL's mmdet 3.5.1 encodes boxes in twice the
    width that the decoder's `ref_point_head` takes.
    """

    def forward(
        self,
        query: Tensor,
        value: Tensor,
        *,
        reference_points: Tensor,
        valid_ratios: Tensor,
        reg_branches: nn.ModuleList,
        self_attn_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Decode as mmdet does.

        Args:
            query: [B, Q, C].
            value: [B, N, C], the image's features.
            reference_points: [B, Q, 4] (cx, cy, w, h in 0..1).
            valid_ratios: [B, levels, 2], of the padded image.
            reg_branches: of each layer, [B, Q, C] to what is added to its boxes.
            self_attn_mask: bool [Q, Q], True: hidden. Denoising groups see only themselves.
            **kwargs: of the layers, in mmdet's names.

        Returns:
            mmdet's outputs [layers, B, Q, C] and the boxes that each layer started from
            [layers, B, Q, 4]. mmdet moves them after the last layer too; none of its heads
            reads those.
        """
        scale = torch.cat([valid_ratios, valid_ratios], -1)[:, None]
        bias = None if self_attn_mask is None else as_bias(self_attn_mask, query)
        barred: Tensor | None = kwargs.pop('text_attention_mask', None)
        if barred is not None:
            kwargs['text_attention_mask'] = as_bias(barred, query)
        width = self.ref_point_head.layers[0].in_features // 4
        outputs, boxes = [], [reference_points]
        for number, layer in enumerate(self.layers):
            if number:
                # A layer's loss reaches the boxes of the layer before: only what goes on is
                # detached.
                moved = reg_branches[number - 1](query) + before_sigmoid(reference_points, 1e-3)
                boxes.append(moved.sigmoid())
                reference_points = boxes[-1].detach()
            on_levels = reference_points[:, :, None] * scale
            encoded = encode_boxes(on_levels[:, :, 0], width)
            query = layer(
                query,
                query_pos=self.ref_point_head(encoded),
                value=value,
                self_attn_mask=bias,
                valid_ratios=valid_ratios,
                reference_points=on_levels,
                **kwargs,
            )
            outputs.append(self.norm(query))
        return torch.stack(outputs), torch.stack(boxes)

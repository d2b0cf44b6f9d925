"""Grounding DINO's decoder turns the denoising mask into a bias once, not once per layer."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerDecoder
from torch import Tensor


class LeanDecoder(GroundingDinoTransformerDecoder):
    """This decoder equals mmdet's in arguments, parameters, names and results."""

    def forward(
        self, query: Tensor, *args: Any, self_attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Decode as mmdet does.

        Args:
            query: [B, Q, C].
            *args: mmdet's.
            self_attn_mask: bool [Q, Q], True: hidden. Denoising groups see only themselves.
            **kwargs: mmdet's.

        Returns:
            mmdet's: outputs [layers, B, Q, C] and reference boxes [layers + 1, B, Q, 4].
        """
        if self_attn_mask is not None and self_attn_mask.dtype == torch.bool:
            # Attention kernels turn a bool mask into a bias and keep that for the backward pass:
            # once here, rather than once per layer.
            device = query.device.type
            autocast = torch.is_autocast_enabled(device)
            dtype = torch.get_autocast_dtype(device) if autocast else query.dtype
            bias = torch.zeros_like(self_attn_mask, dtype=dtype)
            self_attn_mask = bias.masked_fill_(self_attn_mask, float('-inf'))
        return super().forward(query, *args, self_attn_mask=self_attn_mask, **kwargs)

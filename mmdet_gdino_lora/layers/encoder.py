"""Grounding DINO's encoder fuses image and text in every layer, and then attends within each."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.models.layers.transformer.grounding_dino_layers import GroundingDinoTransformerEncoder
from mmdet.models.layers.transformer.utils import get_text_sine_pos_embed
from torch import Tensor, nn

from mmdet_gdino_lora.layers.bias import as_bias
from mmdet_gdino_lora.layers.checkpointing import run_checkpointed
from mmdet_gdino_lora.layers.levels import grid, host_shapes


class LeanEncoder(GroundingDinoTransformerEncoder):
    """This encoder equals mmdet's in parameters, names and results, with two differences.

    - ``num_cp``, the number of leading layers whose activations are computed again in the backward
      pass, needs no fairscale and costs nothing where no gradient flows. mmdet wraps the layers
      while it builds them: build its encoder with 0 and set ``num_cp`` afterwards.
    - The text mask belongs to its own image. mmdet repeats it per head in the wrong order, which
      mixes up the masks of a batch whose captions differ; with one caption the results are equal.
    """

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        key_padding_mask: Tensor | None,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        valid_ratios: Tensor,
        memory_text: Tensor,
        text_attention_mask: Tensor | None = None,
        pos_text: Tensor | None = None,
        text_self_attention_masks: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Encode the image features and the text together.

        Args:
            query: [B, S, C] flattened image features.
            query_pos: [B, S, C] their position encodings.
            key_padding_mask: bool [B, S], True: padding; None without padding.
            spatial_shapes: int64 [levels, 2], see `layers.levels`.
            level_start_index: int64 [levels].
            valid_ratios: [B, levels, 2], the unpadded share of (width, height).
            memory_text: [B, T, C] text features.
            text_attention_mask: bool [B, T], True: padding.
            pos_text: [B, T, C] position encodings of the text; made from ``position_ids``, or from
                the token's index, where None.
            text_self_attention_masks: bool [B, T, T], True: the token in the row sees the one in
                the column.
            position_ids: int [B, T], the token's place within its phrase.

        Returns:
            The encoded image features [B, S, C] and text features [B, T, C].
        """
        masks = dict(attention_mask_v=key_padding_mask, attention_mask_l=text_attention_mask)
        text = _text_inputs(memory_text, text_self_attention_masks, pos_text, position_ids)
        image = dict(
            query_pos=query_pos,
            reference_points=self.get_encoder_reference_points(
                spatial_shapes, valid_ratios, query.device
            ),
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            key_padding_mask=key_padding_mask,
        )
        layers = zip(self.fusion_layers, self.text_layers, self.layers)
        for index, (fuse, enhance, attend) in enumerate(layers):
            run = run_checkpointed if index < self.num_cp else _run
            query, memory_text = run(fuse, visual_feature=query, lang_feature=memory_text, **masks)
            memory_text = enhance(query=memory_text, **text)
            query = run(attend, query=query, **image)
        return query, memory_text

    @staticmethod
    def get_encoder_reference_points(
        spatial_shapes: Tensor, valid_ratios: Tensor, device: torch.device | str
    ) -> Tensor:
        """Compute mmdet's reference points without waiting for the device.

        Args:
            spatial_shapes: int64 [levels, 2].
            valid_ratios: [B, levels, 2].
            device: where the result belongs.

        Returns:
            float32 [B, S, levels, 2]: the centre of each position in 0..1 of the unpadded image,
            times the level's valid ratio.
        """
        places = grid(host_shapes(spatial_shapes), torch.device(device))
        sizes = (valid_ratios * places.sizes).index_select(1, places.level)
        return (places.centres / sizes)[:, :, None] * valid_ratios[:, None]


def _text_inputs(
    memory_text: Tensor,
    sees: Tensor | None,
    pos_text: Tensor | None,
    position_ids: Tensor | None,
) -> dict[str, Tensor | None]:
    """What every text layer gets beside the text, see `LeanEncoder.forward`."""
    if position_ids is None and pos_text is None:
        position_ids = torch.arange(memory_text.shape[1], device=memory_text.device)
        position_ids = position_ids.expand(len(memory_text), -1).float()
    if position_ids is not None:
        pos_text = get_text_sine_pos_embed(
            position_ids[..., None], num_pos_feats=256, exchange_xy=False
        )
    hidden = None if sees is None else as_bias(~sees[:, None], memory_text)
    return dict(query_pos=pos_text, attn_mask=hidden, key_padding_mask=None)


def _run(module: nn.Module, **inputs: Any) -> Any:
    return module(**inputs)

"""mmdet's Grounding DINO with this project's layers: the way from features to the head's inputs.

The parameters and their names are mmdet's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from mmdet.models.detectors import GroundingDINO
from mmdet.structures import SampleList
from torch import Tensor

from mmdet_gdino_lora.layers.levels import (
    host_shapes,
    level_tensors,
    padding_mask,
    seen_sizes,
)
from mmdet_gdino_lora.layers.positions import level_positions
from mmdet_gdino_lora.layers.precision import as_autocast
from mmdet_gdino_lora.layers.proposals import Proposals, select_proposals
from mmdet_gdino_lora.text import TokenizedCaption
from mmdet_gdino_lora.transfer import to_device


class Encoded(NamedTuple):
    """Of a batch under one caption of each image.

    Attributes:
        outputs: Of ``forward_encoder``.
        decoder_inputs: Of ``pre_transformer``.
    """

    outputs: dict[str, Any]
    decoder_inputs: dict[str, Any]


class LeanGroundingDINO(GroundingDINO):
    """mmdet's ``GroundingDINO`` in fewer operations and without waiting for the device.

    Every argument of ``GroundingDINO`` keeps its meaning.
    """

    encoder: Any  # its config, until its layers are made

    def _init_layers(self) -> None:
        # mmdet would wrap the checkpointed layers with fairscale; the lean encoder needs none.
        config: dict[str, Any] = self.encoder
        self.encoder = {**config, 'num_cp': 0}
        super()._init_layers()
        self.get_submodule('encoder').num_cp = config.get('num_cp', 0)

    def encode_text(self, captions: Sequence[TokenizedCaption]) -> dict[str, Tensor]:
        """Encodes captions in the transformer's width.

        Args:
            captions: One per image.

        Returns:
            ``embedded`` [B, T, C], ``text_token_mask`` [B, T], ``position_ids`` [B, T], ``masks``
            [B, T, T]: True where one token attends to another.
        """
        text_dict = self.language_model.encode(captions)
        text_dict['embedded'] = self.text_feat_map(text_dict['embedded'])
        return text_dict

    def parse_losses(self, losses: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Sums the losses up as mmengine does, which takes two operations for each of them.

        Args:
            losses: By name; what has no ``loss`` in its name is for the log alone.

        Returns:
            The sum, and what is logged.
        """
        values = [value for name, value in losses.items() if 'loss' in name]
        if not all(isinstance(v, Tensor) and v.dim() == 0 for v in losses.values()) or not values:
            return super().parse_losses(losses)
        total = torch.stack(values).sum()
        return total, OrderedDict(loss=total, **losses)

    def pre_transformer(
        self, mlvl_feats: Sequence[Tensor], batch_data_samples: Optional[SampleList] = None
    ) -> tuple[dict, dict]:
        """Prepares features as mmdet does; the device isn't asked for the levels' sizes.

        Args:
            mlvl_feats: Feature maps [B, C, H, W], one per level.
            batch_data_samples: With ``img_shape`` and ``batch_input_shape``.

        Returns:
            Inputs of the encoder and inputs of the decoder.
        """
        assert batch_data_samples, 'the images are padded as their samples say'
        batch, device = len(batch_data_samples), mlvl_feats[0].device
        spatial_shapes, level_start_index = level_tensors(mlvl_feats)
        shapes = host_shapes(spatial_shapes)
        seen = seen_sizes(
            shapes,
            [sample.img_shape for sample in batch_data_samples],
            batch_data_samples[0].batch_input_shape,
        )
        if seen is None:
            mask = None
            valid_ratios = mlvl_feats[0].new_ones(batch, len(shapes), 2)
        else:
            mask = to_device(padding_mask(shapes, seen), device)
            ratios = seen.astype(np.float32) / np.array(shapes, np.float32)
            valid_ratios = to_device(np.ascontiguousarray(ratios[..., ::-1]), device)
        positions = [
            position + embedding
            for position, embedding in zip(
                level_positions(self.positional_encoding, shapes, seen, device), self.level_embed
            )
        ]
        levels = dict(
            spatial_shapes=spatial_shapes,
            level_start_index=level_start_index,
            valid_ratios=valid_ratios,
        )
        encoder_inputs = dict(
            feat=torch.cat([feat.flatten(2).transpose(1, 2) for feat in mlvl_feats], 1),
            feat_mask=mask,
            feat_pos=torch.cat(positions, 1).expand(batch, -1, -1),
            **levels,
        )
        return encoder_inputs, dict(memory_mask=mask, **levels)

    def forward_transformer(
        self,
        img_feats: Sequence[Tensor],
        text_dict: dict,
        batch_data_samples: Optional[SampleList] = None,
    ) -> dict:
        """Goes from features to the head's inputs, as mmdet does.

        Args:
            img_feats: Feature maps [B, C, H, W], one per level.
            text_dict: As :meth:`encode_text` returns it.
            batch_data_samples: As for :meth:`pre_transformer` and :meth:`pre_decoder`.

        Returns:
            Inputs of the head.
        """
        prepared = self.pre_transformer(img_feats, batch_data_samples)
        return self.transform(prepared, text_dict, batch_data_samples)

    def transform(
        self,
        prepared: tuple[dict, dict],
        text_dict: dict,
        batch_data_samples: Optional[SampleList] = None,
    ) -> dict:
        """Does the part of :meth:`forward_transformer` that depends on the caption.

        Args:
            prepared: What :meth:`pre_transformer` returned; it serves any number of captions.
            text_dict: As :meth:`encode_text` returns it.
            batch_data_samples: As for :meth:`pre_decoder`.

        Returns:
            Inputs of the head.
        """
        encoder_inputs, decoder_inputs = prepared
        outputs = self.forward_encoder(**encoder_inputs, text_dict=text_dict)
        return self.decode(Encoded(outputs, decoder_inputs), batch_data_samples)

    def decode(self, encoded: Encoded, batch_data_samples: Optional[SampleList] = None) -> dict:
        """Does the part of :meth:`transform` that comes behind the encoder.

        Args:
            encoded: Of the encoder.
            batch_data_samples: As for :meth:`pre_decoder`.

        Returns:
            Inputs of the head.
        """
        selected, head_inputs = self.pre_decoder(
            batch_data_samples=batch_data_samples, **encoded.outputs
        )
        return {**head_inputs, **self.forward_decoder(**encoded.decoder_inputs, **selected)}

    def select_proposals(
        self,
        memory: Tensor,
        memory_mask: Optional[Tensor],
        spatial_shapes: Tensor,
        memory_text: Tensor,
        text_token_mask: Tensor,
        positions: Optional[Tensor] = None,
    ) -> Proposals:
        """Selects the encoder's proposals that become the decoder's queries.

        Args:
            memory: Image features after the encoder [B, N, C].
            memory_mask: True at padding [B, N], or None.
            spatial_shapes: Height and width of every level [levels, 2].
            memory_text: Text features after the encoder [B, T, C].
            text_token_mask: True at real tokens [B, T].
            positions: Which ones [B, Q]; None: the best.

        Returns:
            ``num_queries`` of them.
        """
        last = self.decoder.num_layers
        return select_proposals(
            memory,
            memory_mask,
            spatial_shapes,
            memory_text,
            text_token_mask,
            transform=lambda x: self.memory_trans_norm(self.memory_trans_fc(x)),
            classify=self.bbox_head.cls_branches[last],
            regress=self.bbox_head.reg_branches[last],
            num_queries=self.num_queries,
            positions=positions,
        )

    def pre_decoder(
        self, batch_data_samples: Optional[SampleList] = None, **encoder_outputs: Any
    ) -> tuple[dict, dict]:
        """Makes the decoder's inputs from the encoder's outputs.

        As mmdet's, but the encoder's outputs are returned in eval mode too (validation losses need
        them) and denoising may be off.

        Args:
            batch_data_samples: Ground truth, for the denoising queries.
            **encoder_outputs: As for :meth:`select_proposals`.

        Returns:
            Inputs of the decoder and inputs of the head.
        """
        proposals = self.select_proposals(**encoder_outputs)
        memory, memory_text = encoder_outputs['memory'], encoder_outputs['memory_text']
        text_token_mask = encoder_outputs['text_token_mask']
        query = as_autocast(self.query_embedding.weight)[None].expand(memory.shape[0], -1, -1)
        reference_points = proposals.boxes.detach()
        dn_mask, dn_meta = None, None
        if self.training and self.dn_query_generator is not None:
            dn_query, dn_boxes, dn_mask, dn_meta = self.dn_query_generator(batch_data_samples)
            query = torch.cat([dn_query, query], dim=1)
            reference_points = torch.cat([dn_boxes, reference_points], dim=1)
        decoder_inputs = dict(
            query=query,
            memory=memory,
            reference_points=reference_points.sigmoid(),
            dn_mask=dn_mask,
            memory_text=memory_text,
            text_attention_mask=~text_token_mask,
        )
        head_inputs = dict(
            enc_outputs_class=proposals.logits,
            enc_outputs_coord=proposals.boxes.sigmoid(),
            dn_meta=dn_meta,
            memory_text=memory_text,
            text_token_mask=text_token_mask,
        )
        return decoder_inputs, head_inputs

    def forward_decoder(self, query: Tensor, **kwargs: Any) -> dict:
        """Decodes as mmdet does, also without denoising queries.

        Args:
            query: Content queries [B, Q, C].
            **kwargs: As for mmdet's ``DINO.forward_decoder``; ``memory`` is the decoder's value.

        Returns:
            ``hidden_states`` [L, B, Q, C] and ``references`` [L, B, Q, 4].
        """
        hidden_states, references = self.decoder(
            query=query,
            value=kwargs.pop('memory'),
            key_padding_mask=kwargs.pop('memory_mask'),
            self_attn_mask=kwargs.pop('dn_mask'),
            reg_branches=self.bbox_head.reg_branches,
            **kwargs,
        )
        return dict(hidden_states=hidden_states, references=references)

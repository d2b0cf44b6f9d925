"""The two graphs that are exported, and what goes into and comes out of them.

Images come as they are (pixel values 0..255, one size per batch, no padding): the graph normalises
them. Boxes are (x1, y1, x2, y2) in the pixels of the image that was put in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mmdet.models.layers.transformer.utils import inverse_sigmoid
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.export.layers import exchange_for_graph, level_shapes
from mmdet_gdino_lora.text.tokens import TokenizedCaption
from mmdet_gdino_lora.transformer import LeanGroundingDINO

TEXT = ('embedded', 'masks', 'position_ids', 'text_token_mask')
"""What the transformer reads of encoded captions."""


class DetectorGraph(nn.Module):
    """From images and encoded text to token logits and boxes.

    Args:
        detector: Plain, that is without adapters; its layers are exchanged for the graph's.
    """

    def __init__(self, detector: LeanGroundingDINO) -> None:
        super().__init__()
        self.detector = detector.requires_grad_(False)
        self.eval()  # the graph itself, too: the exporter sets all modules back to its mode
        exchange_for_graph(detector)
        preprocessor = detector.data_preprocessor
        normalises = preprocessor._enable_normalize
        zeros = torch.zeros(3, 1, 1)
        self.register_buffer('mean', preprocessor.mean.clone() if normalises else zeros)
        self.register_buffer('std', preprocessor.std.clone() if normalises else zeros + 1)

    mean: Tensor
    std: Tensor

    def detect(self, images: Tensor, text: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Detects.

        Args:
            images: [B, 3, H, W], pixel values 0..255.
            text: As ``LeanGroundingDINO.encode_text`` returns it, of B captions.

        Returns:
            Token logits [B, Q, T], -inf at padding, and boxes [B, Q, 4], not clipped.
        """
        detector = self.detector
        feats = detector.extract_feat((images - self.mean) / self.std)
        shapes = level_shapes(feats)
        positions = [
            detector.positional_encoding(None, input=feat).flatten(2).transpose(1, 2) + embedding
            for feat, embedding in zip(feats, detector.level_embed)
        ]
        levels = dict(
            spatial_shapes=shapes,
            level_start_index=None,
            valid_ratios=images.new_ones(1, len(shapes), 2),
        )
        encoder_inputs = dict(
            feat=torch.cat([feat.flatten(2).transpose(1, 2) for feat in feats], 1),
            feat_mask=None,
            feat_pos=torch.cat(positions, 1),
            **levels,
        )
        prepared = (encoder_inputs, dict(memory_mask=None, **levels))
        decoded = detector.transform(prepared, text)
        logits, boxes = self._last_layer(decoded)
        height, width = images.shape[-2], images.shape[-1]
        x1, y1, x2, y2 = bbox_cxcywh_to_xyxy(boxes).unbind(-1)
        return logits, torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), -1)

    def _last_layer(self, decoded: dict) -> tuple[Tensor, Tensor]:
        """The head's outputs of the last decoder layer: nobody reads the others'."""
        head, last = self.detector.bbox_head, self.detector.decoder.num_layers - 1
        hidden = decoded['hidden_states'][last]
        logits = head.cls_branches[last](hidden, decoded['memory_text'], decoded['text_token_mask'])
        boxes = head.reg_branches[last](hidden) + inverse_sigmoid(decoded['references'][last])
        return logits, boxes.sigmoid()


class FixedNames(DetectorGraph):
    """A detector of named classes: the text's features are constants.

    Args:
        detector: As for :class:`DetectorGraph`.
        names: Class names.

    Raises:
        ConfigError: The names take more than one caption.
    """

    inputs = ('images',)
    outputs = ('boxes', 'scores', 'labels')

    def __init__(self, detector: LeanGroundingDINO, names: Sequence[str]) -> None:
        super().__init__(detector)
        tokenizer = detector.language_model.caption_tokenizer
        chunk_size = max(0, detector.test_cfg.get('chunked_size', 0))
        captions = tokenizer.in_chunks(names, chunk_size=chunk_size)
        if len(captions) > 1:
            limit = f'model.test_cfg.chunked_size={chunk_size} names, ' if chunk_size else ''
            raise ConfigError(
                f'{len(names)} class names take {len(captions)} captions (of at most {limit}'
                f'{tokenizer.max_tokens} tokens), and a graph with fixed names has one; give fewer '
                'names, or export with --text, whose captions are inputs.'
            )
        self.caption: TokenizedCaption = captions[0]
        with torch.no_grad():
            text = detector.encode_text([self.caption])
        for name in TEXT:
            self.register_buffer(f'text_{name}', text[name])
        means = torch.from_numpy(self.caption.class_map())
        self.register_buffer('means', (means / means.sum(1, keepdim=True)).t().contiguous())
        queries = detector.num_queries
        most = detector.bbox_head.test_cfg.get('max_per_img', queries)
        self.num_detections = min(most, queries * len(names))

    means: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Detects the named classes, as ``LoRAGroundingDINO.predict`` does.

        Args:
            images: [B, 3, H, W].

        Returns:
            The best K of each image, best first: boxes [B, K, 4], clipped to the image; scores
            [B, K]; labels [B, K], int64.
        """
        batch = images.shape[0]
        text = {name: getattr(self, f'text_{name}') for name in TEXT}
        text = {name: tensor.expand(batch, *tensor.shape[1:]) for name, tensor in text.items()}
        logits, boxes = self.detect(images, text)
        scores = (logits.sigmoid() @ self.means).flatten(1)
        scores, places = scores.topk(self.num_detections, dim=1)
        classes = self.means.shape[1]
        queries = torch.div(places, classes, rounding_mode='floor')
        boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        x, y = boxes[..., 0::2], boxes[..., 1::2]
        x, y = _clipped(x, images.shape[-1]), _clipped(y, images.shape[-2])
        return torch.stack((x, y), -1).flatten(2), scores, places - queries * classes


class TextInput(DetectorGraph):
    """A detector of whatever the text says: its tokens are inputs, the text tower is inside."""

    inputs = ('images', 'input_ids', 'attention_mask', 'position_ids', 'text_token_mask')
    outputs = ('logits', 'boxes')

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        text_token_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Detects what captions name.

        Args:
            images: [B, 3, H, W].
            input_ids: [1 or B, T] int64, from [CLS] to [SEP].
            attention_mask: [1 or B, T, T] bool, True where one token attends to another: those of
                one segment do.
            position_ids: [1 or B, T] int64, position within the segment.
            text_token_mask: [1 or B, T] bool, False at padding.

        Returns:
            Token logits [B, Q, T], -inf at padding, and boxes [B, Q, 4], not clipped.
        """
        batch = images.shape[0]
        embedded = self._embedded(input_ids, attention_mask, position_ids)
        return self.detect(
            images,
            dict(
                embedded=embedded.expand(batch, -1, -1),
                masks=attention_mask.expand(batch, -1, -1),
                position_ids=position_ids.expand(batch, -1),
                text_token_mask=text_token_mask.expand(batch, -1),
            ),
        )

    def _embedded(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        """Encodes whole captions; ``GroundingTextEncoder`` encodes segments, with equal results."""
        text_model = self.detector.language_model.language_backbone.get_submodule('body')
        features = text_model.encode(input_ids, position_ids, attention_mask[:, None])
        return self.detector.text_feat_map(features[..., 0, :])


def _clipped(coordinates: Tensor, size: int) -> Tensor:
    return torch.minimum(coordinates.clamp(min=0), torch.ones_like(coordinates) * size)

"""What mmdet's data samples bring to the detector: captions, targets, and boxes in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from mmdet.structures import SampleList
from torch import Tensor

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text import CaptionTokenizer, TokenizedCaption


def caption_of(sample: Any, tokenizer: CaptionTokenizer) -> TokenizedCaption:
    """A sample's tokenised caption: the loader's, or made here from the class names.

    Args:
        sample: With ``caption_tokens`` (from ``TokenSpans``), or with ``text``: a sequence of class
            names, names joined by `` . ``, or a caption together with ``tokens_positive``.
        tokenizer: The text encoder's.

    Returns:
        The caption.
    """
    if 'caption_tokens' in sample:
        return sample.caption_tokens
    if sample.get('tokens_positive') is not None:
        return tokenizer.from_text(sample.text, sample.tokens_positive)
    names = sample.text
    if isinstance(names, str):
        names = [name for name in (part.strip(' .') for part in names.split('. ')) if name]
    return tokenizer.from_names(names)


def is_free_text(sample: Any) -> bool:
    """Whether noun phrases have to be found in the caption (mmdet does that with nltk).

    Args:
        sample: As for :func:`caption_of`.
    """
    if 'caption_tokens' in sample or not isinstance(sample.text, str):
        return False
    tokens_positive = sample.get('tokens_positive')
    return tokens_positive == -1 or (
        tokens_positive is None and not sample.get('custom_entities', False)
    )


class TokenTargets:
    """Puts the tokens of every object's class onto the samples.

    Positive maps of whole captions stay on the device for as long as they serve: indexing them by
    label there spares the step a transfer of labels to the host per image.

    Args:
        most_classes: Labels that the denoising queries have embeddings for; None without them.
    """

    def __init__(self, most_classes: Optional[int]) -> None:
        self._most_classes = most_classes
        self._maps: dict[Any, Tensor] = {}

    def attach(
        self, samples: SampleList, captions: Sequence[TokenizedCaption], text_token_mask: Tensor
    ) -> None:
        """Adds ``positive_maps`` [N, T] and ``text_token_mask`` [N, T] to the ground truth.

        Args:
            samples: With ``gt_instances``.
            captions: One per image.
            text_token_mask: True at real tokens [B, T].

        Raises:
            ConfigError: There are more classes than labels.
        """
        for sample, caption, mask in zip(samples, captions, text_token_mask):
            instances = sample.gt_instances
            positive_map = self._class_map(caption, mask.shape[0], mask.device)
            instances.positive_maps = positive_map[instances.labels]
            instances.text_token_mask = mask[None].expand(len(instances.labels), -1)

    def _class_map(
        self, caption: TokenizedCaption, num_tokens: int, device: torch.device
    ) -> Tensor:
        """Positive map of every class, [classes, T]."""
        spans = caption.token_spans
        key = (caption.text, spans if isinstance(spans, tuple) else None, num_tokens, device)
        if key in self._maps:
            return self._maps[key]
        positive_map = torch.from_numpy(caption.class_map(num_tokens))
        if self._most_classes is not None and len(positive_map) > self._most_classes:
            raise ConfigError(
                f'model.bbox_head.num_classes={self._most_classes} is less than the '
                f'{len(positive_map)} classes of the data, and denoising needs a label for each; '
                f'set it to {len(positive_map)} or more.'
            )
        positive_map = positive_map.to(device, non_blocking=True)
        if isinstance(spans, tuple):  # hardly a sampled caption comes twice
            if len(self._maps) >= 64:
                self._maps.clear()
            self._maps[key] = positive_map
        return positive_map


def with_resized_boxes(samples: SampleList) -> SampleList:
    """Ground truth from the original image's pixels to the resized image's.

    mmdet's test pipelines resize first and load annotations afterwards.

    Args:
        samples: With ``gt_instances`` and ``scale_factor``.

    Returns:
        New samples.
    """
    resized = []
    for sample in samples:
        copy = sample.new()
        boxes = sample.gt_instances.bboxes
        copy.gt_instances = sample.gt_instances.clone()
        copy.gt_instances.bboxes = boxes * boxes.new_tensor(sample.scale_factor).repeat(2)
        resized.append(copy)
    return resized

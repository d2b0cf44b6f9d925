"""The targets of a batch, checked and brought together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.transfer import to_device


@dataclass(frozen=True)
class Targets:
    """Ground truth of all B images in a row, on the device.

    Attributes:
        counts: Targets of each image; N in all.
        image: int64 [N], the image of each target.
        labels: [N]; -1 marks rows to ignore.
        boxes: [N, 4] as (cx, cy, w, h) in 0..1.
        spans: bool [N, T], the valid tokens of each target's span.
        named: bool [N], whether the caption has a token for the target at all.
        mask: bool [B, T], True for valid tokens.
        per_image: What the user gave for each image.
    """

    counts: list[int]
    image: Tensor
    labels: Tensor
    boxes: Tensor
    spans: Tensor
    named: Tensor
    mask: Tensor
    per_image: list[dict]

    @classmethod
    def of(cls, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> Targets:
        """Bring a batch together.

        Args:
            outputs: ``pred_logits`` [B, Q, C] (or ``decoder_outputs``) and ``text_token_mask``
                [B, T], C at least T.
            targets: Per image ``labels`` [N], ``boxes`` [N, 4] and ``token_labels`` [N, any]; see
                the criterion's ``forward``.

        Returns:
            The targets.

        Raises:
            ValueError: Sizes that don't fit together.
        """
        logits = (outputs.get('decoder_outputs') or outputs)['pred_logits']
        batch = logits.shape[-3]
        mask = outputs['text_token_mask'].to(logits.device, non_blocking=True).bool()
        if len(targets) != batch or len(mask) != batch:
            raise ValueError(
                f'pred_logits has {batch} images, text_token_mask {len(mask)}, '
                f'targets {len(targets)}'
            )
        num_tokens = mask.shape[1]
        if logits.shape[-1] < num_tokens:
            raise ValueError(
                f'pred_logits has {logits.shape[-1]} tokens, text_token_mask {num_tokens}'
            )
        per_image = [_checked(i, target, logits.device) for i, target in enumerate(targets)]
        counts = [len(target['labels']) for target in per_image]
        image = to_device(np.repeat(np.arange(len(counts)), counts), logits.device)
        maps = [target['token_labels'] for target in per_image]
        width = max([num_tokens, *(m.shape[1] for m in maps if len(m))])
        tokens = torch.cat([_filled(m, width) for m in maps]) > 0
        return cls(
            counts,
            image,
            torch.cat([target['labels'] for target in per_image]),
            torch.cat([target['boxes'] for target in per_image]),
            tokens[:, :num_tokens] & mask.index_select(0, image),
            tokens.any(1),
            mask,
            per_image,
        )

    def for_host(self) -> dict[str, Tensor]:
        """What the host has to know of the targets, under the names of :class:`HostTargets`."""
        return dict(labels=self.labels, spans=self.spans, named=self.named)


class HostTargets:
    """What the host knows of the targets once the step's one transfer has arrived.

    Args:
        counts: Targets of each image.
        labels: [N].
        spans: [N, T], non-zero at the valid tokens of each target's span.
        named: [N], whether the caption has a token for the target.

    Attributes:
        kept: Per image, the numbers in the batch of the targets that count, ascending.
        spans: bool [N, T].

    Raises:
        ConfigError: A target that counts has no token in its caption.
    """

    def __init__(
        self, counts: Sequence[int], labels: np.ndarray, spans: np.ndarray, named: np.ndarray
    ) -> None:
        numbers = np.split(np.arange(len(labels)), np.cumsum(counts)[:-1])
        self.kept = [image[labels[image] >= 0] for image in numbers]
        self.spans = spans.astype(bool)
        for image, kept in enumerate(self.kept):
            nameless = kept[named[kept] == 0]
            if len(nameless):
                raise ConfigError(
                    f'image {image} of the batch has {len(nameless)} boxes whose class has no '
                    f'token in its caption (label {int(labels[nameless[0]])}, for one), and they '
                    'would be trained as background: put TokenSpans behind the transforms that '
                    'bring in other images (Mosaic, MixUp, CopyPaste), and give every label of '
                    'the data a class name'
                )

    @property
    def num_boxes(self) -> int:
        """Number of targets that count."""
        return sum(map(len, self.kept))


def _checked(image: int, target: Mapping[str, Any], device: torch.device) -> dict:
    labels, boxes, tokens = (
        target[key].to(device, non_blocking=True) for key in ('labels', 'boxes', 'token_labels')
    )
    if not len(labels) == len(boxes) == len(tokens):
        raise ValueError(
            f'target of image {image}: {len(labels)} labels, {len(boxes)} boxes, '
            f'{len(tokens)} rows of token_labels'
        )
    boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32)).view(-1, 4)
    return {**target, 'labels': labels, 'boxes': boxes, 'token_labels': tokens}


def _filled(token_labels: Tensor, width: int) -> Tensor:
    """[N, any] filled up to [N, width] with zeros."""
    if not len(token_labels):
        return token_labels.new_zeros((0, width))
    missing = width - token_labels.shape[1]
    return torch.nn.functional.pad(token_labels, (0, missing)) if missing else token_labels

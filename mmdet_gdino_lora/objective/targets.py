"""The targets of a batch: on the device for the costs, on the host for the assignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Targets:
    """Ground truth of a batch, checked and brought together.

    The device knows everything at once; the host learns ``rows``, ``host_spans`` and
    ``num_boxes`` with the step's one transfer (:meth:`arrived`).

    Args:
        outputs: ``pred_logits`` [B, Q, C] and ``text_token_mask`` [B, T], C at least T.
        targets: Per image ``labels`` [N], ``boxes`` [N, 4] and ``token_labels`` [N, any]; see
            the criterion's ``forward``.

    Attributes:
        mask: [B, T] bool, True for valid tokens.
        per_image: The targets' dicts, with tensors on the device.
        spans: Per image [N, T] bool, the valid tokens of each target's span.
        boxes: [sum of N, 4] of all images.
        first: Per image, the number of its first target in the batch.
        rows: Per image [N] bool on the host, False for rows to ignore (label -1).
        host_spans: ``spans`` of all images on the host.
        num_boxes: Number of targets that count.

    Raises:
        ValueError: Sizes that don't fit together.
    """

    def __init__(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> None:
        logits = outputs['pred_logits']
        self.device = logits.device
        self.mask = outputs['text_token_mask'].to(self.device, non_blocking=True).bool()
        if len(targets) != len(logits) or len(self.mask) != len(logits):
            raise ValueError(
                f'pred_logits has {len(logits)} images, text_token_mask {len(self.mask)}, '
                f'targets {len(targets)}'
            )
        if logits.shape[-1] < self.mask.shape[1]:
            raise ValueError(
                f'pred_logits has {logits.shape[-1]} tokens, text_token_mask {self.mask.shape[1]}'
            )
        self.per_image = [self._checked(image, target) for image, target in enumerate(targets)]
        self.spans = [
            self._spans(target['token_labels'], valid)
            for target, valid in zip(self.per_image, self.mask)
        ]
        sizes = [len(spans) for spans in self.spans]
        self.first = np.cumsum([0, *sizes[:-1]])
        self.boxes = torch.cat([target['boxes'] for target in self.per_image])

    def _checked(self, image: int, target: Mapping[str, Any]) -> dict:
        labels, boxes, tokens = (
            target[key].to(self.device, non_blocking=True)
            for key in ('labels', 'boxes', 'token_labels')
        )
        if not len(labels) == len(boxes) == len(tokens):
            raise ValueError(
                f'target of image {image}: {len(labels)} labels, {len(boxes)} boxes, '
                f'{len(tokens)} rows of token_labels'
            )
        boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32)).view(-1, 4)
        return {**target, 'labels': labels, 'boxes': boxes, 'token_labels': tokens}

    @staticmethod
    def _spans(token_labels: Tensor, valid: Tensor) -> Tensor:
        """Cut or fill up to the T tokens of the mask, as bool."""
        spans = valid.new_zeros((len(token_labels), len(valid)))
        if len(spans):
            tokens = token_labels[:, : len(valid)]
            width = tokens.shape[1]
            torch.logical_and(tokens > 0, valid[:width], out=spans[:, :width])
        return spans

    def for_host(self) -> list[Tensor]:
        """What :meth:`arrived` wants, to go with the step's one transfer."""
        return [torch.cat([t['labels'] for t in self.per_image]) >= 0, torch.cat(self.spans)]

    def arrived(self, keep: np.ndarray, spans: np.ndarray) -> None:
        """Take the host's copies of :meth:`for_host`."""
        self.rows = np.split(keep.astype(bool), self.first[1:])
        self.host_spans = spans.astype(bool)
        self.num_boxes = int(keep.sum())

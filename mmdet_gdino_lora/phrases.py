"""Phrases that the model can't see: their boxes don't count, and the run goes on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from mmdet.structures import DetDataSample, SampleList
from mmengine.logging import MMLogger

from mmdet_gdino_lora.text import TokenizedCaption
from mmdet_gdino_lora.text.tokens import shortened


class LostPhrases:
    """Counts phrases that captions are without, and warns of the first.

    It belongs to the detector, in the main process: captions tell it what was left out of them in
    whichever worker. Counts are told again when they have grown tenfold.
    """

    def __init__(self) -> None:
        self.phrases = self.images = 0
        self._told = 0

    def count(
        self, samples: SampleList, captions: Sequence[Sequence[TokenizedCaption]], lost_boxes: bool
    ) -> None:
        """Counts those of a batch.

        Args:
            samples: One per image.
            captions: Per image, its captions.
            lost_boxes: Whether their boxes don't count.
        """
        for sample, caption in _with_lost(samples, captions):
            self.phrases += len(caption.lost)
            self.images += 1
            if not self._told:
                self._warn(sample, caption, lost_boxes)
        if self.phrases >= 10 * self._told > 0:
            MMLogger.get_current_instance().info(
                f'{self.phrases:,} phrases of {self.images:,} images were left out so far.'
            )
            self._told = self.phrases

    def _warn(self, sample: DetDataSample, caption: TokenizedCaption, lost_boxes: bool) -> None:
        self._told = self.phrases
        first = next(iter(caption.lost.values()))
        why = (
            'ends behind the last token of the caption that fits'
            if first.has_tokens
            else ('has no token in the caption')
        )
        image = sample.get('img_path') or sample.get('img_id')
        left_out = 'left out with their boxes' if lost_boxes else 'left out'
        MMLogger.get_current_instance().warning(
            f'phrases that the model does not see are {left_out}: first {first.name}, which {why} '
            f'{shortened(caption.text)!r} of image {image} ({len(caption.lost)} of its '
            f'{len(caption.lost) + len(caption.labels)} phrases); shorten such captions or correct '
            "their tokens_positive, or stop at the first with TokenSpans(on_lost_phrase='stop') in "
            'the training pipeline'
        )


def without_lost(samples: SampleList, captions: Sequence[TokenizedCaption]) -> SampleList:
    """Makes padded rows, which don't count, of the boxes of phrases that captions are without.

    Nobody waits for the GPU, as leaving rows out would.

    Args:
        samples: With ``gt_instances``, from which :class:`~.datasets.TokenSpans` may have left the
            boxes out already.
        captions: One per image.

    Returns:
        The samples; copies where a caption is without a phrase.
    """
    result = list(samples)
    for place, (sample, caption) in enumerate(zip(samples, captions)):
        if not caption.lost:
            continue
        copy = sample.new()
        copy.gt_instances = sample.gt_instances.clone()
        labels = copy.gt_instances.labels
        lost = torch.zeros_like(labels, dtype=torch.bool)
        for label in caption.lost:
            lost |= labels == label
        copy.gt_instances.labels = labels.masked_fill(lost, -1)
        result[place] = copy
    return result


def _with_lost(
    samples: SampleList, captions: Sequence[Sequence[TokenizedCaption]]
) -> Iterator[tuple[DetDataSample, TokenizedCaption]]:
    for sample, of_image in zip(samples, captions):
        for caption in of_image:
            if caption.lost:
                yield sample, caption

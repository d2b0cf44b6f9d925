"""Keeping what the base knew: the base is one switch away, so it teaches its adapted self.

Adapters that learn new classes bend whatever they touch, and a detector that never sees the old
classes again forgets them. Here the training images are shown a second time under a caption of
names that must survive, to the base (adapters off) and to the adapted model, and the adapted
outputs are held to the base's: learning without forgetting (Li and Hoiem, 2016) with the frozen
base as the teacher. No second model and none of the data that the base was trained on is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.structures import SampleList
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from mmengine.logging import MessageHub
from torch import Tensor, nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import base_only, lora_state
from mmdet_gdino_lora.objective.boxes import l1_and_giou
from mmdet_gdino_lora.text import CaptionTokenizer, TokenizedCaption

WEIGHTS = dict(ce=2.0, bbox=5.0, giou=2.0)
"""Of the three parts to each other, as in the objective."""


IMAGE_TOWER = {'backbone', 'neck'}
"""Parts of the detector that make the image features."""

BEHIND_ENCODER = {
    'decoder',
    'bbox_head',
    'memory_trans_fc',
    'memory_trans_norm',
    'query_embedding',
    'dn_query_generator',
}
"""Parts of the detector that the encoder's outputs don't depend on."""


class Encoded(NamedTuple):
    """Of a batch under one caption.

    Attributes:
        outputs: Of ``forward_encoder``.
        decoder_inputs: Of ``pre_transformer``.
    """

    outputs: dict[str, Any]
    decoder_inputs: dict[str, Any]


class Outputs(NamedTuple):
    """Of every decoder layer and, last, of the encoder's proposals, for the same queries.

    Attributes:
        logits: L + 1 times [B, Q, T], -inf at padding.
        boxes: L + 1 times [B, Q, 4], (cx, cy, w, h) in 0..1.
        positions: int64 [B, Q], the encoder's positions that became the queries.
        references: [B, Q, 4], the boxes that the decoder started from.
    """

    logits: list[Tensor]
    boxes: list[Tensor]
    positions: Tensor
    references: Tensor


class Lesson(NamedTuple):
    """What the base says of a batch.

    Attributes:
        caption: The names that it was asked for.
        outputs: Its answer, without gradient.
        features: The image tower's, where the adapted one has the same.
        encoded: The encoder's outputs, where the adapted one has the same.
    """

    caption: TokenizedCaption
    outputs: Outputs
    features: Optional[Sequence[Tensor]]
    encoded: Optional[Encoded]


class Retention:
    """Holds the adapted detector to its base under a caption of names that must survive.

    The adapted decoder starts from the base's proposals and boxes, so that every query of the one
    stands beside the same query of the other and nothing has to be matched.

    Args:
        tokenizer: Of the detector's text encoder.
        names: Class names that must survive. Of more than a caption holds, each lesson draws some.
        weight: Of the retention loss beside the objective; more keeps more and learns less.
        every: Only every so many-th iteration is a lesson, which costs and holds so much less.

    Raises:
        ConfigError: No names, a name that can't be prompted, or numbers out of range.
    """

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        names: Optional[Sequence[str]] = None,
        weight: float = 1.5,
        every: int = 1,
    ) -> None:
        if isinstance(names, str) or not names or not all(isinstance(n, str) for n in names):
            raise ConfigError(
                f'model.retain.names={names!r}: give a list of the class names that must survive'
            )
        if not isinstance(weight, (int, float)) or weight <= 0:
            raise ConfigError(f'model.retain.weight={weight!r} is not a number above 0')
        if not isinstance(every, int) or every < 1:
            raise ConfigError(f'model.retain.every={every!r} is not a whole number from 1 on')
        self.names = tuple(names)
        self.weight = float(weight)
        self.every = every
        self._tokenizer = tokenizer
        try:
            self._lengths = tokenizer.lengths(self.names)
        except ConfigError as error:
            raise ConfigError(f'model.retain.names: {error}') from error
        most = tokenizer.max_name_tokens
        if self._lengths.max() > most:
            longest = self.names[int(self._lengths.argmax())]
            raise ConfigError(
                f'model.retain.names: {longest!r} alone takes more than the {most} '
                'tokens that a caption has for it; shorten it or leave it out'
            )

    def is_due(self) -> bool:
        """Whether this iteration is a lesson."""
        hub = MessageHub.get_current_instance()
        iteration = hub.get_info('iter') if 'iter' in hub.runtime_info else 0
        return iteration % self.every == 0

    def teach(self, detector: nn.Module, inputs: Tensor, samples: SampleList) -> Lesson:
        """Asks the base. To be called before the step's own forward pass.

        Args:
            detector: The adapted detector.
            inputs: Normalised images [B, 3, H, W].
            samples: Their data samples.

        Returns:
            For :meth:`loss`.

        Raises:
            ConfigError: The base is random or of unknown origin.
        """
        base = lora_state(detector).base
        if base is None or not base.source:
            raise ConfigError(
                'model.retain needs a base to learn from, and this one is random or of unknown '
                'origin; set model.base_checkpoint or load_from.'
            )
        caption = self._caption()
        training = detector.training
        detector.eval()
        try:
            with torch.no_grad(), base_only(detector):
                features = detector.extract_feat(inputs)
                encoded = _encode(detector, features, samples, caption)
                outputs = _decode(detector, encoded)
        finally:
            detector.train(training)
        trained = {n.split('.')[0] for n, p in detector.named_parameters() if p.requires_grad}
        return Lesson(
            caption,
            outputs,
            features if trained.isdisjoint(IMAGE_TOWER) else None,
            encoded if trained <= BEHIND_ENCODER else None,
        )

    def loss(
        self, detector: nn.Module, features: Sequence[Tensor], samples: SampleList, lesson: Lesson
    ) -> dict[str, Tensor]:
        """How far the adapted outputs are from the base's.

        Args:
            detector: The adapted detector.
            features: Of the images.
            samples: Their data samples.
            lesson: Of the same images.

        Returns:
            Weighted ``loss_retain_ce``, ``loss_retain_bbox`` and ``loss_retain_giou``.
        """
        encoded = lesson.encoded or _encode(detector, features, samples, lesson.caption)
        parts = distance(_decode(detector, encoded, lesson.outputs), lesson.outputs)
        return {
            f'loss_retain_{name}': value * (self.weight * WEIGHTS[name])
            for name, value in parts.items()
        }

    def _caption(self) -> TokenizedCaption:
        """All names, or as many as fit, drawn anew for every lesson."""
        lengths, tokenizer = self._lengths, self._tokenizer
        if lengths.sum() <= tokenizer.max_name_tokens:
            return tokenizer.from_names(self.names)
        order = torch.randperm(len(self.names)).numpy()
        fitting = np.searchsorted(lengths[order].cumsum(), tokenizer.max_name_tokens, side='right')
        return tokenizer.join([self.names[place] for place in order[:fitting]])


def _encode(
    detector: nn.Module,
    features: Sequence[Tensor],
    samples: SampleList,
    caption: TokenizedCaption,
) -> Encoded:
    text = detector.encode_text([caption] * len(samples))
    encoder_inputs, decoder_inputs = detector.pre_transformer(features, samples)
    return Encoded(detector.forward_encoder(**encoder_inputs, text_dict=text), decoder_inputs)


def _decode(detector: nn.Module, encoded: Encoded, taught: Optional[Outputs] = None) -> Outputs:
    """The detector's outputs; for the queries that the base selected, where it was asked before."""
    encoded, decoder_inputs = encoded.outputs, encoded.decoder_inputs
    proposals = detector.select_proposals(**encoded, positions=taught and taught.positions)
    references = proposals.boxes.detach().sigmoid() if taught is None else taught.references
    decoded = detector.forward_decoder(
        query=detector.query_embedding.weight[None].expand(len(references), -1, -1),
        memory=encoded['memory'],
        reference_points=references,
        dn_mask=None,
        memory_text=encoded['memory_text'],
        text_attention_mask=~encoded['text_token_mask'],
        **decoder_inputs,
    )
    logits, boxes = detector.bbox_head(
        **decoded,
        memory_text=encoded['memory_text'],
        text_token_mask=encoded['text_token_mask'],
    )
    return Outputs(
        [*logits.unbind(), proposals.logits],
        [*boxes.unbind(), proposals.boxes.sigmoid()],
        proposals.positions,
        references,
    )


def distance(adapted: Outputs, taught: Outputs) -> dict[str, Tensor]:
    """How far one set of outputs is from another.

    Per layer, with the teacher's token probabilities p and scores s = max p of each query:

    * ``ce``: Kullback-Leibler divergence of the adapted token probabilities from p, summed over
      the tokens, mean over the queries;
    * ``bbox`` and ``giou``: L1 distance and 1 - GIoU of the boxes, summed with weight s and divided
      by the sum of s (over all ranks) or by 1, whichever is more: where the base sees nothing, its
      box means nothing.

    Args:
        adapted: With gradient.
        taught: The teacher's.

    Returns:
        Sums over the layers.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in WEIGHTS}
    for logits, boxes, base_logits, base_boxes in zip(
        adapted.logits, adapted.boxes, taught.logits, taught.boxes
    ):
        valid = base_logits.isfinite()
        target = base_logits.float().masked_fill(~valid, 0)
        own = logits.float().masked_fill(~valid, 0)
        p = target.sigmoid()
        divergence = (
            p * (F.logsigmoid(target) - F.logsigmoid(own))
            + (1 - p) * (F.logsigmoid(-target) - F.logsigmoid(-own))
        ).masked_fill(~valid, 0)
        parts['ce'].append(divergence.sum(-1).mean())
        score = p.masked_fill(~valid, 0).amax(-1).flatten()
        score = score / reduce_mean(score.sum()).clamp(min=1 / get_world_size())
        l1, giou = l1_and_giou(
            boxes.flatten(0, 1).float().t(), base_boxes.flatten(0, 1).float().t()
        )
        parts['bbox'].append((score * l1).sum())
        parts['giou'].append((score * (1 - giou)).sum())
    return {name: torch.stack(values).sum() for name, values in parts.items()}

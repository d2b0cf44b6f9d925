"""Keeping what the base knew: the base is one switch away, so it teaches its adapted self.

Adapters that learn new classes bend whatever they touch, and a detector that never sees the old
classes again forgets them. Here the training images are shown a second time under a caption of
names that must survive, to the base (adapters off) and to the adapted model, and the adapted
outputs are held to the base's. This is knowledge distillation from the frozen base as the teacher,
as in learning without forgetting (Li and Hoiem, 2016). No second model and none of the data that
the base was trained on is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.structures import SampleList
from mmdet.utils import reduce_mean
from mmengine.dist import get_world_size
from mmengine.logging import MessageHub
from torch import Tensor

from mmdet_gdino_lora.checks.adapter import check_retain
from mmdet_gdino_lora.checks.findings import tell
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import IMAGE_TOWER, base_only, evaluating, lora_state
from mmdet_gdino_lora.objective.boxes import L1AndGIoU
from mmdet_gdino_lora.text import CaptionTokenizer, TokenizedCaption
from mmdet_gdino_lora.transformer import Encoded, LeanGroundingDINO

WEIGHTS = dict(ce=2.0, bbox=5.0, giou=2.0)
"""Of the three parts to each other, as in the objective."""


BEHIND_ENCODER = {
    'decoder',
    'bbox_head',
    'memory_trans_fc',
    'memory_trans_norm',
    'query_embedding',
    'dn_query_generator',
}
"""Parts of the detector that the encoder's outputs don't depend on."""


class Outputs(NamedTuple):
    """Of every decoder layer and, last, of the encoder's proposals, for the same queries.

    Attributes:
        logits: [L + 1, B, Q, T], -inf at padding.
        boxes: [L + 1, B, Q, 4], (cx, cy, w, h) in 0..1.
        positions: int64 [B, Q], the encoder's positions that became the queries.
        references: [B, Q, 4], the boxes that the decoder started from.
    """

    logits: Tensor
    boxes: Tensor
    positions: Tensor
    references: Tensor


class Teacher(NamedTuple):
    """What the base, as the teacher, makes of a batch.

    Attributes:
        caption: The names that it was asked for.
        outputs: Its outputs, without gradient.
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
        names: Class names that must survive. Of more than a caption holds, some are drawn
            each time.
        weight: Of the retention loss beside the objective; more keeps more and learns less.
        every: Only every so many-th iteration distils, which costs and holds so much less.

    Raises:
        ConfigError: No names, a name that can't be prompted, or numbers out of range.
    """

    def __init__(
        self,
        tokenizer: CaptionTokenizer,
        names: Sequence[str] = (),
        weight: float = 1.5,
        every: int = 1,
    ) -> None:
        found = check_retain(dict(names=names, weight=weight, every=every))
        tell(finding for finding in found if finding.fatal)
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

    @classmethod
    def from_config(cls, tokenizer: CaptionTokenizer, settings: Mapping[str, Any]) -> Retention:
        """As the constructor, from the config's ``retain``.

        Args:
            tokenizer: Of the detector's text encoder.
            settings: Values by key.

        Returns:
            The retention.

        Raises:
            ConfigError: For another key, and as the constructor.
        """
        tell(finding for finding in check_retain(settings) if finding.fatal)
        return cls(tokenizer, **settings)

    def is_due(self) -> bool:
        """Whether the teacher is asked in this iteration."""
        hub = MessageHub.get_current_instance()
        iteration = hub.get_info('iter') if 'iter' in hub.runtime_info else 0
        return iteration % self.every == 0

    def ask_teacher(
        self,
        detector: LeanGroundingDINO,
        inputs: Tensor,
        samples: SampleList,
        encoded: Optional[Encoded] = None,
    ) -> Teacher:
        """Runs the base. To be called before the step's own forward pass.

        Args:
            detector: The adapted detector.
            inputs: Normalised images [B, 3, H, W].
            samples: Their data samples.
            encoded: Under :attr:`fixed_caption`, where that is known already.

        Returns:
            For :meth:`loss`.

        Raises:
            ConfigError: The base is random or of unknown origin.
        """
        state = lora_state(detector)
        base = state.base
        if base is None or not base.source:
            raise ConfigError(
                'model.retain needs a base to learn from, and this one is random or of unknown '
                'origin; set model.base_checkpoint or load_from.'
            )
        caption, features, known = self._caption(), None, encoded is not None
        with torch.no_grad(), evaluating(detector), base_only(detector):
            if encoded is None:
                features = detector.extract_feat(inputs)
                encoded = _encode(detector, features, samples, caption)
            outputs = _decode(detector, encoded)
        # Not what is trained now: a checkpoint may have brought more that isn't the base's.
        differing = state.switch.parts(detector)
        return Teacher(
            caption,
            outputs,
            features if differing.isdisjoint(IMAGE_TOWER) else None,
            encoded if known or differing <= BEHIND_ENCODER else None,
        )

    def loss(
        self,
        detector: LeanGroundingDINO,
        features: Optional[Sequence[Tensor]],
        samples: SampleList,
        teacher: Teacher,
    ) -> dict[str, Tensor]:
        """How far the adapted outputs are from the base's.

        Args:
            detector: The adapted detector.
            features: Of the images; not needed where the teacher has ``encoded``.
            samples: Their data samples.
            teacher: Of the same images.

        Returns:
            Weighted ``loss_retain_ce``, ``loss_retain_bbox`` and ``loss_retain_giou``.
        """
        encoded = teacher.encoded
        if encoded is None:
            assert features is not None, 'what the encoder makes of them is not known'
            encoded = _encode(detector, features, samples, teacher.caption)
        student = _decode(detector, encoded, teacher.outputs)
        parts = distillation_losses(student, teacher.outputs)
        return {
            f'loss_retain_{name}': value * (self.weight * WEIGHTS[name])
            for name, value in parts.items()
        }

    @property
    def fixed_caption(self) -> Optional[TokenizedCaption]:
        """Of all names; None where they take more than one caption and are drawn."""
        if self._lengths.sum() <= self._tokenizer.max_name_tokens:
            return self._tokenizer.from_names(self.names)
        return None

    def _caption(self) -> TokenizedCaption:
        """All names, or as many as fit, drawn anew each time."""
        fixed, lengths, tokenizer = self.fixed_caption, self._lengths, self._tokenizer
        if fixed is not None:
            return fixed
        order = torch.randperm(len(self.names)).numpy()
        fitting = np.searchsorted(lengths[order].cumsum(), tokenizer.max_name_tokens, side='right')
        return tokenizer.join([self.names[place] for place in order[:fitting]])


def _encode(
    detector: LeanGroundingDINO,
    features: Sequence[Tensor],
    samples: SampleList,
    caption: TokenizedCaption,
) -> Encoded:
    text = detector.encode_text([caption] * len(samples))
    encoder_inputs, decoder_inputs = detector.pre_transformer(features, samples)
    return Encoded(detector.forward_encoder(**encoder_inputs, text_dict=text), decoder_inputs)


def _decode(
    detector: LeanGroundingDINO, encoded: Encoded, teacher: Optional[Outputs] = None
) -> Outputs:
    """The detector's outputs; for the teacher's queries, where it was asked before."""
    outputs, decoder_inputs = encoded.outputs, encoded.decoder_inputs
    proposals = detector.select_proposals(
        **outputs, positions=None if teacher is None else teacher.positions
    )
    references = proposals.boxes.detach().sigmoid() if teacher is None else teacher.references
    decoded = detector.forward_decoder(
        query=detector.query_embedding.weight[None].expand(len(references), -1, -1),
        memory=outputs['memory'],
        reference_points=references,
        dn_mask=None,
        memory_text=outputs['memory_text'],
        text_attention_mask=~outputs['text_token_mask'],
        **decoder_inputs,
    )
    logits, boxes = detector.bbox_head(
        **decoded,
        memory_text=outputs['memory_text'],
        text_token_mask=outputs['text_token_mask'],
    )
    return Outputs(
        torch.cat([logits, proposals.logits[None]]),
        torch.cat([boxes, proposals.boxes.sigmoid()[None]]),
        proposals.positions,
        references,
    )


def distillation_losses(student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    """How far the student's outputs are from the teacher's, all layers at once.

    Per layer, with the teacher's token probabilities p and scores s = max p of each query:

    * ``ce``: Kullback-Leibler divergence of the student's token probabilities from p, summed over
      the tokens, mean over the queries;
    * ``bbox`` and ``giou``: L1 distance and 1 - GIoU of the boxes, summed with weight s and divided
      by the sum of s (over all ranks) or by 1, whichever is more: where the base sees nothing, its
      box means nothing.

    Args:
        student: With gradient.
        teacher: Without.

    Returns:
        Sums over the layers.
    """
    valid = teacher.logits.isfinite()
    wanted = teacher.logits.float().masked_fill(~valid, 0)
    found = student.logits.float().masked_fill(~valid, 0)
    p = wanted.sigmoid()
    divergence = (
        p * (F.logsigmoid(wanted) - F.logsigmoid(found))
        + (1 - p) * (F.logsigmoid(-wanted) - F.logsigmoid(-found))
    ).masked_fill(~valid, 0)
    score = p.masked_fill(~valid, 0).amax(-1).flatten(1)
    total = reduce_mean(score.sum(1, keepdim=True)).clamp(min=1 / get_world_size())
    score = (score / total).flatten()
    l1, giou = L1AndGIoU.apply(
        student.boxes.flatten(0, 2).float().t(), teacher.boxes.flatten(0, 2).float().t()
    )
    return dict(
        ce=divergence.sum(-1).flatten(1).mean(1).sum(),
        bbox=(score * l1).sum(),
        giou=(score * (1 - giou)).sum(),
    )

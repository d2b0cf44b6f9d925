"""A caption's tokens: ids, the segments between special tokens, and each class's tokens.

A special token ends a segment: ``[CLS] | hot dog . | cat . | [SEP]``. Tokens attend within their
segment alone and positions start anew in each (Grounding DINO, section 3.4, "sub-sentence level
representation").
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np

from mmdet_gdino_lora.errors import ConfigError

PerClass = Union[tuple, Mapping[int, Any]]


class CharSpans(list):
    """Character spans [[begin, end], ...] as mmdet has them: lists, but not to be changed.

    mmengine copies every image's meta information; spans are shared by all images instead.
    """

    def __deepcopy__(self, memo: dict) -> CharSpans:
        return self


@dataclasses.dataclass(frozen=True, eq=False)
class TokenizedCaption:
    """A caption's tokens. Immutable, in numpy, made in the loader's workers.

    Attributes:
        text: The caption.
        input_ids: Token ids, [T] int32, from [CLS] to [SEP].
        segment_ids: Number of the segment that each token belongs to, [T] int32, ascending.
            ``segment_ids[i] == segment_ids[j]`` is mmdet's block attention mask.
        position_ids: Position within the segment, [T] int32.
        names: Per class, its cleaned name; of a caption that somebody wrote, the phrase.
        token_spans: Per class, the indices of its tokens, ascending.
        tokens_positive: Per class, its character spans [[begin, end], ...]: mmdet's format.
        made_of: Per class, the name or prompt that the caption was made of; None for a caption that
            somebody wrote.
        sampled: Whether classes were left out, so that it is for training alone.
        lost: By label, phrases that it is without, for the model could not see them.

    What is said per class is a tuple over all classes (``tokens_positive``: a list); where only
    some classes are in the caption, it is a dict by class label.
    """

    text: str
    input_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray
    names: PerClass
    token_spans: PerClass
    tokens_positive: Union[CharSpans, Mapping[int, CharSpans]]
    made_of: Optional[PerClass] = None
    sampled: bool = False
    lost: Mapping[int, Any] = dataclasses.field(default_factory=dict)

    def __deepcopy__(self, memo: dict) -> TokenizedCaption:
        # mmengine copies every meta information of every image; nothing here ever changes.
        return self

    @property
    def labels(self) -> Sequence[int]:
        """Labels of the classes in the caption, in the order in which they stand there."""
        spans = self.token_spans
        return tuple(spans) if isinstance(spans, Mapping) else range(len(spans))

    @property
    def num_tokens(self) -> int:
        """Number of tokens T, [CLS] and [SEP] included."""
        return len(self.input_ids)

    def positive_map(self, labels: Any, num_tokens: Optional[int] = None) -> np.ndarray:
        """Marks the tokens that stand for each object.

        Args:
            labels: Class labels [N]; -1 marks a padded row.
            num_tokens: Columns; defaults to the number of tokens.

        Returns:
            [N, num_tokens] float32, 1 at the tokens of the object's class, 0 elsewhere; all 0 in
            padded rows.

        Raises:
            ConfigError: A label has no class in the caption.
        """
        labels = np.asarray(labels, dtype=np.int64).reshape(-1)
        result = np.zeros((len(labels), num_tokens or self.num_tokens), dtype=np.float32)
        for row, label in enumerate(labels.tolist()):
            if label != -1:
                result[row, list(self._span(label))] = 1
        return result

    def class_map(self, num_tokens: Optional[int] = None) -> np.ndarray:
        """Marks the tokens that stand for each class, to be indexed by label.

        Args:
            num_tokens: Columns; defaults to the number of tokens.

        Returns:
            [highest label + 1, num_tokens] float32 of 0 and 1; all 0 for a class that is not in
            the caption.
        """
        spans = self.token_spans
        if isinstance(spans, tuple):
            return self.positive_map(np.arange(len(spans)), num_tokens)
        labels = np.full(max(spans, default=-1) + 1, -1)
        labels[list(spans)] = list(spans)
        return self.positive_map(labels, num_tokens)

    def _span(self, label: int) -> tuple[int, ...]:
        spans = self.token_spans
        if label in spans if isinstance(spans, Mapping) else 0 <= label < len(spans):
            return spans[label]
        raise ConfigError(
            f'label {label} has no class in the caption {shortened(self.text)!r}, which has '
            f'{len(spans)} classes; labels and class names (metainfo, label map) have to match'
        )


def segments(is_special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parts a caption into segments, and counts positions anew in each.

    Equal to mmdet's ``generate_masks_with_special_tokens_and_transfer_map`` for one caption
    without padding. There the last token and those before it that no special token ends (a caption
    cut at its end) attend to themselves only.

    Args:
        is_special: True at special tokens, [T] bool.

    Returns:
        Number of each token's segment, ascending, and its position in there, both [T] int32.
    """
    length = len(is_special)
    starts = np.zeros(length, dtype=bool)
    starts[0] = True
    starts[1:] = is_special[:-1]
    inner = np.flatnonzero(is_special[: length - 1])
    starts[inner[-1] + 1 if len(inner) else 0 :] = True
    segment_ids = np.cumsum(starts) - 1
    position_ids = np.arange(length) - np.flatnonzero(starts)[segment_ids]
    return segment_ids.astype(np.int32), position_ids.astype(np.int32)


def shortened(text: str, length: int = 60) -> str:
    """Shortens a caption for an error message.

    Args:
        text: The caption.
        length: Most characters.

    Returns:
        Its beginning.
    """
    return text if len(text) <= length else text[: length - 3] + '...'

"""A batch of captions as arrays: which segments to encode, and where their tokens go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmdet_gdino_lora.text.tokens import TokenizedCaption

#: Token ids of one segment.
Segment = tuple[int, ...]

#: The segments of a chunk come in multiples of this. A segment's features are then the same to the
#: bit in whatever company it is encoded, so that remembering them changes nothing.
_MULTIPLE = 16


@dataclass(frozen=True)
class CaptionBatch:
    """Captions padded to one length. A padding token is a segment of its own, at position 0.

    Attributes:
        segments: The distinct segments of all captions.
        segment: For every token, which of ``segments`` it is in, [B, T] int64.
        position_ids: Its position in there, [B, T] int64.
        segment_ids: Number of its segment within its caption, [B, T] int64.
        valid: 1 at tokens, 0 at padding, [B, T] int64.
    """

    segments: tuple[Segment, ...]
    segment: np.ndarray
    position_ids: np.ndarray
    segment_ids: np.ndarray
    valid: np.ndarray


def collate(captions: Sequence[TokenizedCaption], pad_id: int, min_length: int = 0) -> CaptionBatch:
    """Puts captions into one batch.

    Args:
        captions: One per image.
        pad_id: Token id of padding.
        min_length: Length to pad to, where the longest caption is shorter.

    Returns:
        The batch.
    """
    length = max(min_length, *(caption.num_tokens for caption in captions))
    shape = (len(captions), length)
    # ids of padding: one segment each, behind all others
    segment_ids = np.tile(np.arange(length, 2 * length), (len(captions), 1))
    segment, position_ids, valid = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    index: dict[Segment, int] = {}
    images: dict[bytes, int] = {}
    for image, caption in enumerate(captions):
        # loader workers send equal captions as different objects
        same = images.setdefault(caption.input_ids.tobytes(), image)
        size = caption.num_tokens
        valid[image, :size] = 1
        segment_ids[image, :size] = caption.segment_ids
        position_ids[image, :size] = caption.position_ids
        if same == image:
            segment[image, :size] = _segment_index(caption, index)[caption.segment_ids]
        else:
            segment[image] = segment[same]
    if not valid.all():
        segment[valid == 0] = index.setdefault((pad_id,), len(index))
    return CaptionBatch(tuple(index), segment, position_ids, segment_ids, valid)


def _segment_index(caption: TokenizedCaption, index: dict[Segment, int]) -> np.ndarray:
    ids = caption.input_ids.tolist()
    begins = np.flatnonzero(caption.position_ids == 0).tolist()
    return np.array(
        [
            index.setdefault(tuple(ids[begin:end]), len(index))
            for begin, end in zip(begins, [*begins[1:], len(ids)])
        ]
    )


@dataclass(frozen=True)
class Chunk:
    """Segments of similar length, padded to one length.

    Attributes:
        input_ids: [N, L] int64; behind the segments stand some of padding alone.
        lengths: Tokens of each, [N] int64, at least 1.
        members: Numbers of the segments, which are the first of the N.
    """

    input_ids: np.ndarray
    lengths: np.ndarray
    members: tuple[int, ...]


def chunks(segments: Sequence[Segment], pad_id: int, max_length: int) -> list[Chunk]:
    """Sorts segments into chunks, padded to 4, 8, 16, ... tokens.

    Args:
        segments: Token ids.
        pad_id: Token id of padding.
        max_length: Longest segment that the model takes.

    Returns:
        The chunks, shortest first.
    """
    by_length: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        length = min(max(4, 1 << (len(segment) - 1).bit_length()), max_length)
        by_length.setdefault(length, []).append(number)
    result = []
    for length, members in sorted(by_length.items()):
        count = -(-len(members) // _MULTIPLE) * _MULTIPLE
        input_ids = np.full((count, length), pad_id, dtype=np.int64)
        lengths = np.ones(count, dtype=np.int64)
        for place, number in enumerate(members):
            lengths[place] = len(segments[number])
            input_ids[place, : lengths[place]] = segments[number]
        result.append(Chunk(input_ids, lengths, tuple(members)))
    return result

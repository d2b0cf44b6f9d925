"""From captions to tokens: ids, the segments between special tokens, and each class's tokens.

A special token ends a segment: ``[CLS] | hot dog . | cat . | [SEP]``. Tokens attend within their
segment alone and positions start anew in each (Grounding DINO, section 3.4, "sub-sentence level
representation"). So a class name has the same ids wherever it stands, and names are tokenised one
by one, once per process; a caption is put together from them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text.caption import SEPARATOR, CharSpan, caption_of, clean_name
from mmdet_gdino_lora.text.files import text_model

SPECIAL_TOKENS = ('[CLS]', '[SEP]', '.', '?')

#: Captions and names remembered per tokenizer; enough for the names of any known dataset.
_CAPTIONS, _NAMES = 1024, 65536

PerClass = Union[tuple, Mapping[int, Any]]


class CharSpans(list):
    """Character spans [[begin, end], ...] as mmdet has them: lists, but not to be changed.

    mmengine copies every image's meta information; spans are shared by all images instead.
    """

    def __deepcopy__(self, memo: dict) -> CharSpans:
        return self


@dataclass(frozen=True, eq=False)
class TokenizedCaption:
    """A caption's tokens. Immutable, in numpy, made in the loader's workers.

    Attributes:
        text: The caption.
        input_ids: Token ids, [T] int32, from [CLS] to [SEP].
        segment_ids: Number of the segment that each token belongs to, [T] int32, ascending.
            ``segment_ids[i] == segment_ids[j]`` is mmdet's block attention mask.
        position_ids: Position within the segment, [T] int32.
        names: Per class, its name as it stands in the caption.
        token_spans: Per class, the indices of its tokens, ascending.
        tokens_positive: Per class, its character spans [[begin, end], ...]: mmdet's format.

    Names and token spans are tuples over all classes and ``tokens_positive`` is a list; where only
    some classes are in the caption, they are dicts by class label.
    """

    text: str
    input_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray
    names: PerClass
    token_spans: PerClass
    tokens_positive: Union[CharSpans, Mapping[int, CharSpans]]

    def __deepcopy__(self, memo: dict) -> TokenizedCaption:
        # mmengine copies every meta information of every image; nothing here ever changes.
        return self

    @property
    def num_tokens(self) -> int:
        """Number of tokens T, [CLS] and [SEP] included."""
        return len(self.input_ids)

    def positive_map(self, labels: Any, num_tokens: Optional[int] = None) -> np.ndarray:
        """Which tokens stand for each object.

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
        """Positive map of every class, to be indexed by label.

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
            f'label {label} has no class in the caption {_shortened(self.text)!r}, which has '
            f'{len(spans)} classes; labels and class names (metainfo, label map) have to match'
        )


class _Piece(NamedTuple):
    """A class name with its separator, tokenised."""

    name: str
    input_ids: tuple[int, ...]
    tokens: tuple[int, ...]  # the name's own, counted from the piece's first


class CaptionTokenizer:
    """Tokenises captions and finds the tokens of every class in them.

    Args:
        tokenizer: Folder or name of a text model, or its fast tokenizer.
        max_tokens: Longest caption in tokens, [CLS] and [SEP] included.
        special_tokens: Tokens that end a segment.

    Raises:
        ConfigError: No tokenizer there, or one without character offsets, [CLS], [SEP] or '.'.
    """

    def __init__(
        self,
        tokenizer: Union[str, PreTrainedTokenizerBase],
        max_tokens: int = 256,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> None:
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.max_tokens = max_tokens
        name = self.tokenizer.name_or_path
        if not self.tokenizer.is_fast:
            raise ConfigError(
                f'the tokenizer of {name!r} gives no character offsets, which token spans need; '
                'use a fast tokenizer (a folder with tokenizer.json or vocab.txt)'
            )
        # The tokenizer's core, in a copy: every call of transformers' leaves its padding and
        # truncation behind there, and its batches warn in workers forked afterwards.
        self._core = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        self._core.no_padding()
        self._core.no_truncation()
        self._first, self._last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        if self._core.encode('').ids != [self._first, self._last]:
            raise ConfigError(
                f'the tokenizer of {name!r} does not put [CLS] and [SEP] around a caption; '
                "Grounding DINO needs a BERT's tokenizer"
            )
        self.special_ids = special_token_ids(self.tokenizer, special_tokens)
        self._is_special = np.zeros(len(self.tokenizer), dtype=bool)
        self._is_special[list(self.special_ids)] = True
        if self._encode(SEPARATOR)[0][-1:] != self.tokenizer.convert_tokens_to_ids(['.']):
            raise ConfigError(
                f"the tokenizer of {name!r} has no token '.', which separates class names"
            )
        if '.' not in special_tokens:
            raise ConfigError(
                f"special_tokens={list(special_tokens)} lacks '.', which separates class names"
            )
        self._pieces: Memo = Memo(_NAMES)
        self._captions: Memo = Memo(_CAPTIONS)

    @property
    def room(self) -> int:
        """Tokens that a caption has for its classes: ``max_tokens`` without [CLS] and [SEP]."""
        return self.max_tokens - 2

    def lengths(self, names: Sequence[str]) -> np.ndarray:
        """Tokens that each class takes in a caption, its separator included.

        Args:
            names: Class names.

        Returns:
            [len(names)] int64.

        Raises:
            ConfigError: A name has nothing to tokenise.
        """
        return np.array([len(self._piece(name).input_ids) for name in names], dtype=np.int64)

    def from_names(
        self, names: Sequence[str], labels: Optional[Sequence[int]] = None
    ) -> TokenizedCaption:
        """Caption of class names.

        Args:
            names: Class names, as a dataset gives them.
            labels: Their labels, where these are not 0, 1, 2, ...; spans are then kept by label.

        Returns:
            The caption, without the space at its end: mmdet adds another ``'. '`` to a caption
            that doesn't end with a dot when it predicts, and not when it trains.

        Raises:
            ConfigError: Classes don't fit into ``max_tokens``, or a name has nothing to tokenise.
        """
        key = (tuple(names), None if labels is None else tuple(labels))
        caption = self._captions.get(key)
        if caption is None:
            caption = self._captions.add(key, self.join(*key))
        return caption

    def from_text(
        self, text: str, tokens_positive: Union[Sequence, Mapping[int, Sequence]]
    ) -> TokenizedCaption:
        """Caption that somebody wrote, with the characters of every phrase in it.

        A caption longer than ``max_tokens`` is cut, if no phrase is lost by that.

        Args:
            text: The caption. A dot is added at its end where there is none.
            tokens_positive: Per phrase (a sequence, or a dict by label), its character spans
                [[begin, end], ...].

        Returns:
            The caption.

        Raises:
            ConfigError: A phrase has no token in the caption or falls past ``max_tokens``.
        """
        items = dict(
            tokens_positive.items()
            if isinstance(tokens_positive, Mapping)
            else enumerate(tokens_positive)
        )
        spans = {int(label): _char_spans(phrase) for label, phrase in items.items()}
        key = (text, tuple(spans.items()), isinstance(tokens_positive, Mapping))
        caption = self._captions.get(key)
        if caption is None:
            caption = self._captions.add(key, self._locate(text, spans, not key[2]))
        return caption

    def from_plain_text(self, text: str) -> TokenizedCaption:
        """Caption as it is, without classes; cut where it is longer than ``max_tokens``.

        Args:
            text: The caption.

        Returns:
            The caption.
        """
        caption = self._captions.get(text)
        if caption is None:
            ids = [self._first, *self._encode(text)[0][: self.room], self._last]
            caption = self._captions.add(text, self._caption(text, ids, (), (), (), None))
        return caption

    def join(
        self, names: Sequence[str], labels: Optional[Sequence[int]] = None
    ) -> TokenizedCaption:
        """As :meth:`from_names`, but the caption is not remembered.

        Args:
            names: Class names.
            labels: Their labels.

        Returns:
            The caption.

        Raises:
            ConfigError: As :meth:`from_names`.
        """
        pieces = [self._piece(name) for name in names]
        ids = [self._first]
        starts = []
        for piece in pieces:
            starts.append(len(ids))
            ids += piece.input_ids
        ids.append(self._last)
        if len(ids) > self.max_tokens:
            raise self._too_long(
                [
                    name
                    for name, piece, start in zip(names, pieces, starts)
                    if start + len(piece.input_ids) >= self.max_tokens
                ],
                len(ids),
                f'a caption of {len(names)} classes',
            )
        cleaned = [piece.name for piece in pieces]
        caption = caption_of(cleaned)
        token_spans = [
            tuple([start + token for token in piece.tokens]) for start, piece in zip(starts, pieces)
        ]
        return self._caption(
            caption.text[:-1],
            ids,
            cleaned,
            caption.spans,
            token_spans,
            labels,
        )

    def _locate(
        self, text: str, spans: Mapping[int, tuple[CharSpan, ...]], every_label: bool
    ) -> TokenizedCaption:
        text = text.rstrip()
        if not text.endswith('.'):
            text += '.'
        ids, offsets = self._encode(text)
        token_spans = {
            # behind [CLS]
            label: tuple([1 + token for token in _overlapping(offsets, phrase)])
            for label, phrase in spans.items()
        }
        names = {
            label: ' / '.join(text[begin:end] for begin, end in phrase)
            for label, phrase in spans.items()
        }
        empty = [names[label] or str(label) for label, tokens in token_spans.items() if not tokens]
        if empty:
            raise ConfigError(
                f'no token of the caption {_shortened(text)!r} stands for {_listed(empty)}; its '
                'tokens_positive have to be [begin, end) characters of the caption'
            )
        lost = [names[label] for label, tokens in token_spans.items() if tokens[-1] > self.room]
        if lost:
            raise self._too_long(lost, len(ids) + 2, f'the caption {_shortened(text)!r}')
        ids = [self._first, *ids[: self.room], self._last]
        labels = None if every_label else tuple(spans)
        return self._caption(
            text, ids, names.values(), spans.values(), token_spans.values(), labels
        )

    def _caption(
        self,
        text: str,
        ids: list[int],
        names: Iterable[str],
        char_spans: Iterable[tuple[CharSpan, ...]],
        token_spans: Iterable[tuple[int, ...]],
        labels: Optional[Sequence[int]],
    ) -> TokenizedCaption:
        input_ids = np.array(ids, dtype=np.int32)
        segment_ids, position_ids = segments(self._is_special[input_ids])

        spans = [[list(span) for span in phrase] for phrase in char_spans]
        if labels is None:
            per_class = (tuple(names), tuple(token_spans), CharSpans(spans))
        else:
            values = (names, token_spans, map(CharSpans, spans))
            per_class = tuple(dict(zip(labels, value)) for value in values)
        return TokenizedCaption(text, input_ids, segment_ids, position_ids, *per_class)

    def _piece(self, name: str) -> _Piece:
        piece = self._pieces.get(name)
        if piece is None:
            cleaned = clean_name(name)
            ids, offsets = self._encode(cleaned + SEPARATOR)
            tokens = _overlapping(offsets, [(0, len(cleaned))])
            if all(self._is_special[ids[token]] for token in tokens):
                raise ConfigError(
                    f'class name {name!r} has no word in it after cleaning ({cleaned!r}), so no '
                    'token can stand for it; rename the class'
                )
            piece = self._pieces.add(name, _Piece(cleaned, tuple(ids), tokens))
        return piece

    def _encode(self, text: str) -> tuple[list[int], list[CharSpan]]:
        encoding = self._core.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _too_long(self, names: Sequence[str], num_tokens: int, what: str) -> ConfigError:
        return ConfigError(
            f'{what} takes {num_tokens} tokens, more than max_tokens={self.max_tokens}, and '
            f'{_listed(names)} would be lost; use fewer or shorter names, or sample negatives '
            "down with TokenSpans(num_negatives='fit')"
        )


class Memo(OrderedDict):
    """The latest results, by what they were made of. Copied or pickled, it arrives empty.

    Args:
        size: Most results to keep; the oldest go first.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size

    def add(self, key: Hashable, value: Any) -> Any:
        """Keeps a result.

        Args:
            key: What it was made of.
            value: The result.

        Returns:
            The result.
        """
        if len(self) >= self._size:
            self.popitem(last=False)
        self[key] = value
        return value

    def __reduce__(self) -> tuple:
        return Memo, (self._size,)


def segments(is_special: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segments of a caption and positions in them.

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


def special_token_ids(
    tokenizer: PreTrainedTokenizerBase, special_tokens: Sequence[str]
) -> tuple[int, ...]:
    """Ids of the tokens that end a segment.

    Args:
        tokenizer: Whose vocabulary is asked.
        special_tokens: Tokens; one that is not in the vocabulary is left out, for its id would be
            that of every unknown word.

    Returns:
        Their ids.
    """
    ids = tokenizer.convert_tokens_to_ids(list(special_tokens))
    unknown = tokenizer.unk_token_id
    return tuple(
        id_
        for token, id_ in zip(special_tokens, ids)
        if id_ is not None and (id_ != unknown or token == tokenizer.unk_token)
    )


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a text model.

    Args:
        name: Folder, or name on the Hugging Face hub.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: No text model there.
    """
    return text_model(name, AutoTokenizer.from_pretrained, use_fast=True)


def _overlapping(offsets: Sequence[CharSpan], spans: Sequence[CharSpan]) -> tuple[int, ...]:
    return tuple(
        [
            token
            for token, (begin, end) in enumerate(offsets)
            if any(begin < last and end > first for first, last in spans)
        ]
    )


def _char_spans(phrase: Sequence) -> tuple[CharSpan, ...]:
    if len(phrase) == 2 and not isinstance(phrase[0], Sequence):
        phrase = [phrase]
    return tuple((int(begin), int(end)) for begin, end in phrase)


def _listed(names: Sequence[str], most: int = 8) -> str:
    listed = ', '.join(repr(name) for name in names[:most])
    return listed + (f' and {len(names) - most} more' if len(names) > most else '')


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + '...'

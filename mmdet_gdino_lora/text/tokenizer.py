"""From captions to tokens.

Segments don't see each other (:mod:`~mmdet_gdino_lora.text.tokens`). So a class name has the same
ids wherever it stands, and names are tokenised one by one, once per process; a caption is put
together from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Optional, Union

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from mmdet_gdino_lora.errors import ConfigError, NoWordError
from mmdet_gdino_lora.text.cache import Memo
from mmdet_gdino_lora.text.caption import (
    SEPARATOR,
    CharSpan,
    ClassName,
    Prompt,
    as_prompt,
    build_caption,
)
from mmdet_gdino_lora.text.files import load_tokenizer
from mmdet_gdino_lora.text.phrases import char_spans, locate, lost_phrases, overlapping
from mmdet_gdino_lora.text.tokens import CharSpans, TokenizedCaption, segments

SPECIAL_TOKENS = ('[CLS]', '[SEP]', '.', '?')

#: Captions and names remembered per tokenizer; enough for the names of any known dataset.
_CAPTIONS, _NAMES = 1024, 65536


class _Piece(NamedTuple):
    """What a caption says for one class, its separator included, tokenised."""

    prompt: Prompt
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
        self._cls_id, self._sep_id = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        if self._core.encode('').ids != [self._cls_id, self._sep_id]:
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
        self._pieces = Memo(_NAMES)
        self._captions = Memo(_CAPTIONS)

    @property
    def max_name_tokens(self) -> int:
        """Most tokens of all class names in a caption: ``max_tokens`` without [CLS], [SEP]."""
        return self.max_tokens - 2

    def lengths(self, names: Sequence[ClassName]) -> np.ndarray:
        """Counts the tokens that each class takes in a caption, its separator included.

        Args:
            names: Class names or prompts.

        Returns:
            [len(names)] int64.

        Raises:
            ConfigError: A name has nothing to tokenise.
        """
        return np.array([len(self._piece(name).input_ids) for name in names], dtype=np.int64)

    def from_names(
        self, names: Sequence[ClassName], labels: Optional[Sequence[int]] = None
    ) -> TokenizedCaption:
        """Makes a caption of class names, once.

        Args:
            names: Class names, as a dataset gives them, or prompts.
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
        self,
        text: str,
        tokens_positive: Union[Sequence, Mapping[int, Sequence]],
        drop_lost: bool = False,
    ) -> TokenizedCaption:
        """Tokenises a caption that somebody wrote, and finds every phrase in it.

        A caption longer than ``max_tokens`` is cut behind the last token that fits.

        Args:
            text: The caption. A dot is added at its end where there is none.
            tokens_positive: Per phrase (a sequence, or a dict by label), its character spans
                [[begin, end], ...].
            drop_lost: Whether phrases without a token in the caption, or with one past
                ``max_tokens``, are left out and named in its ``lost``; else they are an error.

        Returns:
            The caption.

        Raises:
            ConfigError: A phrase is lost.
        """
        items = dict(
            tokens_positive.items()
            if isinstance(tokens_positive, Mapping)
            else enumerate(tokens_positive)
        )
        spans = {int(label): char_spans(phrase) for label, phrase in items.items()}
        key = (text, tuple(spans.items()), isinstance(tokens_positive, Mapping))
        caption = self._captions.get(key)
        if caption is None:
            caption = self._captions.add(key, self._locate(text, spans, not key[2]))
        if caption.lost and not drop_lost:
            raise lost_phrases(text, caption.lost, self.max_tokens)
        return caption

    def from_plain_text(self, text: str) -> TokenizedCaption:
        """Tokenises a caption as it is, without classes, cut at ``max_tokens``.

        Args:
            text: The caption.

        Returns:
            The caption.
        """
        caption = self._captions.get(text)
        if caption is None:
            ids = [self._cls_id, *self._encode(text)[0][: self.max_name_tokens], self._sep_id]
            caption = self._captions.add(text, self._caption(text, ids, (), (), (), None))
        return caption

    def join(
        self,
        names: Sequence[ClassName],
        labels: Optional[Sequence[int]] = None,
        sampled: bool = False,
    ) -> TokenizedCaption:
        """Does what :meth:`from_names` does, but doesn't remember the caption.

        Args:
            names: Class names or prompts.
            labels: Their labels.
            sampled: Whether they are a part of the classes, to train from.

        Returns:
            The caption.

        Raises:
            ConfigError: As :meth:`from_names`.
        """
        pieces = [self._piece(name) for name in names]
        ids = [self._cls_id]
        starts = []
        for piece in pieces:
            starts.append(len(ids))
            ids += piece.input_ids
        ids.append(self._sep_id)
        if len(ids) > self.max_tokens:
            raise self._too_long(pieces, starts, sampled)
        caption = build_caption([piece.prompt for piece in pieces])
        token_spans = [
            tuple([start + token for token in piece.tokens]) for start, piece in zip(starts, pieces)
        ]
        class_names = [piece.prompt.class_name for piece in pieces]
        return self._caption(
            caption.text[:-1], ids, class_names, caption.spans, token_spans, labels, names, sampled
        )

    def in_chunks(
        self,
        names: Sequence[ClassName],
        labels: Optional[Sequence[int]] = None,
        chunk_size: Optional[int] = None,
    ) -> tuple[TokenizedCaption, ...]:
        """Makes captions that have all class names between them, as many as it takes.

        Args:
            names: Class names or prompts.
            labels: Their labels, as for :meth:`from_names`.
            chunk_size: Most names of a caption; None: as many as fit into ``max_tokens``.

        Returns:
            The captions. Where it takes one, it is that of :meth:`from_names`; of several, each
            keeps what it says per class by label.

        Raises:
            ConfigError: A name alone doesn't fit into a caption, or has nothing to tokenise.
        """
        begins, used = [0], 0
        for place, length in enumerate(self.lengths(names).tolist()):
            full = used + length > self.max_name_tokens
            if place and (full or (chunk_size and place % chunk_size == 0)):
                begins.append(place)
                used = 0
            used += length
        if len(begins) == 1:
            return (self.from_names(names, labels),)
        labels = range(len(names)) if labels is None else labels
        return tuple(
            self.from_names(names[begin:end], labels[begin:end])
            for begin, end in zip(begins, [*begins[1:], len(names)])
        )

    def _locate(
        self, text: str, spans: Mapping[int, tuple[CharSpan, ...]], every_label: bool
    ) -> TokenizedCaption:
        text = text.rstrip()
        if not text.endswith('.'):
            text += '.'
        ids, offsets = self._encode(text)
        found = locate(text, offsets, spans, self.max_tokens)
        ids = [self._cls_id, *ids[: found.num_tokens], self._sep_id]
        labels = None if every_label and not found.lost else tuple(found.names)
        names, kept, tokens = found.names.values(), found.spans.values(), found.tokens.values()
        caption = self._caption(found.text, ids, names, kept, tokens, labels)
        return dataclasses.replace(caption, lost=found.lost) if found.lost else caption

    def _caption(
        self,
        text: str,
        ids: list[int],
        names: Iterable[str],
        char_spans: Iterable[tuple[CharSpan, ...]],
        token_spans: Iterable[tuple[int, ...]],
        labels: Optional[Sequence[int]],
        made_of: Optional[Sequence[ClassName]] = None,
        sampled: bool = False,
    ) -> TokenizedCaption:
        input_ids = np.array(ids, dtype=np.int32)
        tokens = (text, input_ids, *segments(self._is_special[input_ids]))
        spans = [[list(span) for span in phrase] for phrase in char_spans]
        if labels is None:
            return TokenizedCaption(
                *tokens,
                tuple(names),
                tuple(token_spans),
                CharSpans(spans),
                None if made_of is None else tuple(made_of),
                sampled,
            )
        return TokenizedCaption(
            *tokens,
            dict(zip(labels, names)),
            dict(zip(labels, token_spans)),
            dict(zip(labels, map(CharSpans, spans))),
            None if made_of is None else dict(zip(labels, made_of)),
            sampled,
        )

    def _piece(self, name: ClassName) -> _Piece:
        piece = self._pieces.get(name)
        if piece is None:
            prompt = as_prompt(name)
            caption = build_caption([prompt])
            ids, offsets = self._encode(caption.text)
            tokens = overlapping(offsets, caption.spans[0])
            if all(self._is_special[ids[token]] for token in tokens):
                given = name if isinstance(name, str) else prompt.class_name
                raise NoWordError(
                    f'class name {given!r} has no word in it after cleaning ({prompt.name!r}), so '
                    'no token can stand for it; rename the class'
                )
            piece = self._pieces.add(name, _Piece(prompt, tuple(ids), tokens))
        return piece

    def _encode(self, text: str) -> tuple[list[int], list[CharSpan]]:
        if not text.isascii() and any('\ud800' <= letter <= '\udfff' for letter in text):
            raise ConfigError(
                f'{text!r} has half a character in it, as a cut file leaves it; write the name anew'
            )
        encoding = self._core.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _too_long(
        self, pieces: Sequence[_Piece], starts: Sequence[int], sampled: bool
    ) -> ConfigError:
        ends = [start + len(piece.input_ids) for piece, start in zip(pieces, starts)]
        lost = [p.prompt.class_name for p, end in zip(pieces, ends) if end >= self.max_tokens]
        if len(pieces) == 1:
            remedy = 'shorten the name'
        elif sampled:
            remedy = 'use shorter names, for one image has objects of all these classes'
        else:
            remedy = (
                "use fewer or shorter names; or in training let TokenSpans(num_negatives='fit') "
                'sample the names that an image lacks, and in testing let '
                'model.test_cfg.chunked_size limit the names of a caption'
            )
        return ConfigError(
            f'a caption of {len(pieces)} classes takes {ends[-1] + 1} tokens, more than '
            f'max_tokens={self.max_tokens}, and {_listed(lost)} would be lost; {remedy}'
        )


def special_token_ids(
    tokenizer: PreTrainedTokenizerBase, special_tokens: Sequence[str]
) -> tuple[int, ...]:
    """Looks up the tokens that end a segment.

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


def _listed(names: Sequence[str], most: int = 8) -> str:
    listed = ', '.join(repr(name) for name in names[:most])
    return listed + (f' and {len(names) - most} more' if len(names) > most else '')

"""Phrases of a caption that somebody wrote: their tokens, and which of them the model can't see."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text.caption import CharSpan
from mmdet_gdino_lora.text.tokens import shortened


class LostPhrase(NamedTuple):
    """A phrase that a caption is without.

    Attributes:
        name: Its words, or its characters where these are blank.
        has_tokens: Whether it has tokens, one of which at least is behind the last that is seen.
    """

    name: str
    has_tokens: bool


class Phrases(NamedTuple):
    """Where phrases stand in a caption.

    Attributes:
        text: The caption as far as the model sees it: cut behind a token.
        num_tokens: Its tokens, without [CLS] and [SEP].
        names: By label, the phrases that are kept.
        spans: Their characters.
        tokens: Their tokens, those of the whole caption; [CLS] is token 0.
        lost: By label, those that are left out.
    """

    text: str
    num_tokens: int
    names: dict[int, str]
    spans: dict[int, tuple[CharSpan, ...]]
    tokens: dict[int, tuple[int, ...]]
    lost: dict[int, LostPhrase]


def locate(
    text: str,
    offsets: Sequence[CharSpan],
    spans: Mapping[int, tuple[CharSpan, ...]],
    max_tokens: int,
) -> Phrases:
    """Finds phrases, and leaves out those of which a token or all are out of the model's sight.

    Args:
        text: The whole caption.
        offsets: Characters of each of its tokens, without [CLS] and [SEP].
        spans: Per phrase, its characters.
        max_tokens: Most tokens that the model sees, [CLS] and [SEP] included.

    Returns:
        The phrases; a kept one has all of its tokens.
    """
    most = max_tokens - 2
    found = Phrases(text, min(len(offsets), most), {}, {}, {}, {})
    for label, phrase in spans.items():
        name = ' / '.join(text[begin:end] for begin, end in phrase)
        tokens = tuple([1 + token for token in overlapping(offsets, phrase)])
        if tokens and tokens[-1] <= most:
            found.names[label], found.spans[label], found.tokens[label] = name, phrase, tokens
        else:
            shown = repr(name) if name.strip() else f'{name!r} (characters {list(phrase)})'
            found.lost[label] = LostPhrase(shown, bool(tokens))
    return found._replace(text=text[: offsets[most - 1][1]]) if len(offsets) > most else found


def lost_phrases(text: str, lost: Mapping[int, LostPhrase], max_tokens: int) -> ConfigError:
    """Makes the error for phrases that were to be kept.

    Args:
        text: The caption.
        lost: One at least.
        max_tokens: Most tokens of a caption.

    Returns:
        The error.
    """
    first = next(iter(lost.values()))
    more = f' ({len(lost)} such phrases)' if len(lost) > 1 else ''
    remedy = "or leave such phrases out with their boxes: TokenSpans(on_lost_phrase='drop')"
    if first.has_tokens:
        return ConfigError(
            f'the caption {shortened(text)!r} has more tokens than max_tokens={max_tokens}, and '
            f'{first.name} would be lost{more}; shorten the caption, {remedy}'
        )
    return ConfigError(
        f'no token of the caption {shortened(text)!r} stands for {first.name}{more}; its '
        f'tokens_positive have to be [begin, end) characters of the caption; correct them, {remedy}'
    )


def overlapping(offsets: Sequence[CharSpan], spans: Sequence[CharSpan]) -> tuple[int, ...]:
    """Finds the tokens that share a character with spans.

    Args:
        offsets: Characters of each token.
        spans: Characters.

    Returns:
        Numbers of the tokens, ascending.
    """
    return tuple(
        [
            token
            for token, (begin, end) in enumerate(offsets)
            if any(begin < last and end > first for first, last in spans)
        ]
    )


def char_spans(phrase: Sequence) -> tuple[CharSpan, ...]:
    """Takes a phrase's characters out of an annotation.

    Args:
        phrase: [[begin, end], ...], or one [begin, end].

    Returns:
        The spans.
    """
    if len(phrase) == 2 and not isinstance(phrase[0], Sequence):
        phrase = [phrase]
    return tuple((int(begin), int(end)) for begin, end in phrase)

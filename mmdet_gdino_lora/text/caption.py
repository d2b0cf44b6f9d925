"""From class names to a caption, and to where each class stands in it.

Grounding DINO reads all classes as one caption, ``'cat. hot dog. '``; a class is the characters of
its name in there (Grounding DINO, section 3; mmdet's ``GroundingDINO.to_plain_text_prompts``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: What follows every name in a caption.
SEPARATOR = '. '

#: Character positions [begin, end) in a caption.
CharSpan = tuple[int, int]


def clean_name(name: str) -> str:
    """Class name as it stands in a caption: no parentheses, no underscores; case is kept.

    Equal to mmdet's ``clean_label_name``, odd spaces at the ends included, so that captions and
    character spans are the same to the letter.

    Args:
        name: ``'traffic_light'``, ``'cell phone (old)'``.

    Returns:
        ``'traffic light'``, ``'cell phone '``.
    """
    name = re.sub(r'\(.*\)', '', name)
    return name.replace('_', ' ').replace('  ', ' ')


@dataclass(frozen=True)
class Caption:
    """A caption and the characters of every class in it.

    Attributes:
        text: The caption.
        spans: Per class, its character spans [begin, end).
    """

    text: str
    spans: tuple[tuple[CharSpan, ...], ...]


def build_caption(names: Sequence[str]) -> Caption:
    """Caption of class names, mmdet's form: every name is cleaned and followed by ``'. '``.

    Spans are counted while the caption is put together; searching it for the name would find
    "dog" in "hot dog".

    Args:
        names: Class names; a name may come twice.

    Returns:
        The caption, with one span per name.
    """
    return caption_of(map(clean_name, names))


def caption_of(cleaned: Iterable[str]) -> Caption:
    """As :func:`build_caption`, of names that are clean already.

    Args:
        cleaned: Names as they shall stand in the caption.

    Returns:
        The caption.
    """
    text = ''
    spans = []
    for name in cleaned:
        spans.append(((len(text), len(text) + len(name)),))
        text += name + SEPARATOR
    return Caption(text, tuple(spans))

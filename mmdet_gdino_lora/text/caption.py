"""From class names to a caption, and to where each class stands in it.

Grounding DINO reads all classes as one caption, ``'cat. hot dog. '``; a class is the characters of
its name in there (Grounding DINO, section 3; mmdet's ``GroundingDINO.to_plain_text_prompts``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Optional, Union

from mmdet_gdino_lora.errors import ConfigError

#: What follows every name in a caption.
SEPARATOR = '. '

#: Character positions [begin, end) in a caption.
CharSpan = tuple[int, int]


class Prompt(NamedTuple):
    """What a caption says for one class.

    Attributes:
        class_name: The class's name, cleaned.
        name: What stands for it in the caption: its tokens are the class's.
        prefix: What is said before the name.
        suffix: What is said behind it.
    """

    class_name: str
    name: str
    prefix: str = ''
    suffix: str = ''


#: A class as a caption is made of it: its name, or more to say for it.
ClassName = Union[str, Prompt]


def clean_name(name: str) -> str:
    """Cleans a class name for a caption: parentheses and underscores go, case is kept.

    Equal to mmdet's ``clean_label_name``, odd spaces at the ends included, so that captions and
    character spans are the same to the letter.

    Args:
        name: ``'traffic_light'``, ``'cell phone (old)'``.

    Returns:
        ``'traffic light'``, ``'cell phone '``.
    """
    name = re.sub(r'\(.*\)', '', name)
    return name.replace('_', ' ').replace('  ', ' ')


def split_names(text: str) -> list[str]:
    """Finds the names in one text: ``'hot dog . car'``, or ``'hot dog. car.'``.

    A dot that stands alone separates names, and where there is one, no other dot does:
    ``'U.S. flag . car'`` has two. Without any the names end in a dot and a space, as in a caption
    and as mmdet reads both forms.

    Args:
        text: The text; a dot at its end is welcome.

    Returns:
        The names, without spaces at their ends; empty for a text without any.
    """
    names = re.split(r'(?:^|(?<=\s))\.+(?=\s|$)', text)
    if len(names) == 1:
        names = text.strip(SEPARATOR).split(SEPARATOR)
    return [name for name in map(str.strip, names) if name]


def prompted(
    names: Iterable[str], caption_prompt: Optional[Mapping[str, Mapping[str, str]]]
) -> tuple[ClassName, ...]:
    """Joins class names with what a data set's ``caption_prompt`` says for them.

    mmdet's format and results (``GroundingDINO.to_enhance_text_prompts``); a class is also found by
    its name before cleaning.

    Args:
        names: Class names.
        caption_prompt: ``prefix``, ``suffix`` and ``name`` (in the place of the class's own), each
            optional, by class name; or None.

    Returns:
        Per class its name or, where the prompt says something for it, a :class:`Prompt`.

    Raises:
        ConfigError: The prompt has other keys.
    """
    if not caption_prompt:
        return tuple(names)
    result: list[ClassName] = []
    for name in names:
        cleaned = clean_name(name)
        said = caption_prompt.get(name, caption_prompt.get(cleaned))
        if said is None:
            result.append(name)
            continue
        unknown = sorted(set(said) - {'prefix', 'name', 'suffix'})
        if unknown:
            raise ConfigError(
                f'caption_prompt of {name!r} has the key {unknown[0]!r}; it takes prefix, name and '
                'suffix'
            )
        result.append(Prompt(cleaned, **{'name': cleaned, **said}))
    return tuple(result)


def as_prompt(name: ClassName) -> Prompt:
    """Takes a name for a prompt that says nothing else.

    Args:
        name: Its name, or the prompt itself.

    Returns:
        The prompt: of a name, the cleaned name alone.
    """
    if isinstance(name, Prompt):
        return name
    cleaned = clean_name(name)
    return Prompt(cleaned, cleaned)


@lru_cache(maxsize=8192)
def spoken(name: ClassName) -> str:
    """Returns what a caption says for a class, in the form in which two are compared.

    Args:
        name: Its name, or the prompt.

    Returns:
        ``'hot dog'`` of ``'Hot_dog'``: lower case, single spaces.
    """
    prompt = as_prompt(name)
    return ' '.join(f'{prompt.prefix}{prompt.name}{prompt.suffix}'.lower().split())


@dataclass(frozen=True)
class Caption:
    """A caption and the characters of every class in it.

    Attributes:
        text: The caption.
        spans: Per class, its character spans [begin, end).
    """

    text: str
    spans: tuple[tuple[CharSpan, ...], ...]


def build_caption(names: Iterable[ClassName]) -> Caption:
    """Writes class names as mmdet does: every name is cleaned and followed by ``'. '``.

    Spans are counted while the caption is put together; searching it for the name would find
    "dog" in "hot dog".

    Args:
        names: Class names or prompts; a name may come twice.

    Returns:
        The caption, with one span per class: that of its name, without prefix and suffix.
    """
    text = ''
    spans = []
    for prompt in map(as_prompt, names):
        text += prompt.prefix
        spans.append(((len(text), len(text) + len(prompt.name)),))
        text += prompt.name + prompt.suffix + SEPARATOR
    return Caption(text, tuple(spans))

"""Class names that no token can stand for: they are left out where nothing is learned from them.

Data sets have names of blanks alone. mmdet evaluates such a class, too: it has no tokens, and what
becomes of its scores is nobody's business there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Optional

from mmengine.logging import MMLogger

from mmdet_gdino_lora.errors import NoWordError
from mmdet_gdino_lora.text.caption import ClassName
from mmdet_gdino_lora.text.tokenizer import CaptionTokenizer


def readable(
    tokenizer: CaptionTokenizer, names: Sequence[ClassName], where: str = ''
) -> Sequence[int]:
    """Finds the class names that a token can stand for, and warns once of others.

    Args:
        tokenizer: The text encoder's.
        names: Class names or prompts.
        where: What the data set is known by: a key of the config, or one of its images.

    Returns:
        Places of the names that have a word in them.

    Raises:
        NoWordError: None has.
    """
    try:
        tokenizer.lengths(names)
        return range(len(names))
    except NoWordError as error:
        places = [place for place, name in enumerate(names) if _has_word(tokenizer, name)]
        if not places:
            raise
        lacking = sorted(set(range(len(names))) - set(places))
        first = names[lacking[0]]
        _warn(len(lacking), len(names), first if isinstance(first, str) else None, where, error)
    return places


def _has_word(tokenizer: CaptionTokenizer, name: ClassName) -> bool:
    try:
        tokenizer.lengths([name])
    except NoWordError:
        return False
    return True


def _warn(lacking: int, count: int, first: Optional[str], where: str, error: NoWordError) -> None:
    key = (lacking, count, first)
    if key in _told():
        return
    _told().add(key)
    MMLogger.get_current_instance().warning(
        f'{where or "a data set"}: {lacking} of {count} class names have no word in them; they '
        f'are left out of the caption, so that these classes are never detected; first: {error}'
    )


@cache
def _told() -> set:
    """What was told already in this process: data sets are many, and images more."""
    return set()

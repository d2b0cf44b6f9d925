"""Class names that are codes, which a caption says nothing by."""

from __future__ import annotations

import re

#: A word for any class, and its number.
_NUMBERED = re.compile(
    r'(class|cls|cat|category|label|lbl|obj|object|item|type|id|c|name|defect)[\W_]*\d+', re.I
)
#: Words of two letters that are words.
_SHORT = {'tv', 'ox', 'ax', 'pc', 'cd', 'dvd', 'dj', 'bb'}


def is_code(name: str) -> bool:
    """Tells whether a class name looks like a code.

    Args:
        name: ``'RBC'``, ``'class_3'``, ``'0'``, ``'k7'`` do; ``'red blood cell'`` and ``'tv'`` do
            not.
    """
    word = name.strip()
    if not word.isascii():
        return False
    if _NUMBERED.fullmatch(word):
        return True
    if all(part.lower() in _SHORT for part in word.split()):
        return False
    letters = re.findall('[A-Za-z]{3,}', word)
    return not letters or all(
        part.isupper() and not re.search('[AEIOUY]', part) for part in letters
    )

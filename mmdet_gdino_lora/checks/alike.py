"""Class names that resemble each other so much that they may be one class, spelt twice."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from mmdet_gdino_lora.checks.findings import Finding

#: Letters of a word from which on a single one that differs is taken for a slip.
_LONG = 6


def check_alike(key: str, classes: Sequence[str]) -> list[Finding]:
    """Finds names that differ in case, plural, marks, or by a letter.

    Args:
        key: Where the data set stands in the config.
        classes: Its class names.

    Returns:
        One finding or none.
    """
    plain = [_plain(name) for name in classes]
    pairs = [
        f'{classes[one]!r} and {classes[other]!r}'
        for other in range(len(classes))
        for one in range(other)
        if _alike(plain[one], plain[other])
    ]
    if not pairs:
        return []
    return [
        Finding(
            f'{key}.metainfo.classes: {len(pairs)} pairs of names are nearly the same, and '
            'training tells them apart as two classes, each wrong where the other is labelled; '
            f'join them if they are one; first: {pairs[0]}',
            cases=tuple(pairs),
        )
    ]


def _plain(name: str) -> list[str]:
    """Words in lower case, without marks and the plural's s."""
    words = re.findall(r'[^\W_]+', name.lower())
    return [word.removesuffix('s') if len(word) > 3 else word for word in words]


def _alike(one: Sequence[str], other: Sequence[str]) -> bool:
    if ''.join(one) == ''.join(other):
        return True
    pairs = [(a, b) for a, b in zip(one, other) if a != b]
    return len(one) == len(other) and len(pairs) == 1 and _is_slip(*pairs[0])


def _is_slip(one: str, other: str) -> bool:
    """Whether two long words differ by a letter, which is not the last: that may count."""
    if min(len(one), len(other)) < _LONG:
        return False
    matcher = SequenceMatcher(None, one, other, autojunk=False)
    changes = [code for code in matcher.get_opcodes() if code[0] != 'equal']
    if len(changes) != 1:
        return False
    _, begin, end, other_begin, other_end = changes[0]
    changed = one[begin:end] + other[other_begin:other_end]
    longest = max(end - begin, other_end - other_begin)
    return longest == 1 and changed.isalpha() and end < len(one)

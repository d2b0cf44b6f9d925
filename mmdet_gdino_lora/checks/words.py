"""How findings are worded: some of many names, a share of a total, and what a folder holds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any


def some(names: Sequence[Any], count: int = 5) -> str:
    """Lists the first of many.

    Args:
        names: All of them.
        count: Most that are written out.

    Returns:
        Such as ``'a', 'b' and 7 more``.
    """
    shown = ', '.join(repr(name) for name in names[:count])
    return shown + (f' and {len(names) - count} more' if len(names) > count else '')


def share(count: int, total: int, what: str) -> str:
    """Says how many of how many.

    Args:
        count: Of those meant.
        total: Of all.
        what: Their name in the plural.

    Returns:
        Such as ``5 of 852 boxes``.
    """
    return f'{count:,} of {total:,} {what}'


def contents(folder: str) -> str:
    """Says what kind of files a folder holds.

    Args:
        folder: Its path.

    Returns:
        Such as ``120 .xml files`` by the commonest ending; ``nothing`` for an empty folder.
    """
    endings = Counter(
        os.path.splitext(entry.name)[1].lower() or '(no ending)'
        for entry in os.scandir(folder)
        if entry.is_file()
    )
    if not endings:
        inner = sum(entry.is_dir() for entry in os.scandir(folder))
        return f'{inner} folders' if inner else 'nothing'
    ending, count = endings.most_common(1)[0]
    return f'{count} {ending} file{"s" if count > 1 else ""}'

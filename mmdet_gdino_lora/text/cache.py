"""The latest results of something costly, by what they were made of."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Optional

from cachetools import LRUCache


class Memo(LRUCache):
    """Keeps results up to a size; the least recently used go first.

    It belongs to one object in one process: copied or pickled, it arrives empty.

    Args:
        maxsize: Most results, or the most that their sizes add up to. 0 keeps nothing.
        size_of: Size of one result; None counts every result as 1.
    """

    def __init__(self, maxsize: int, size_of: Optional[Callable[[Any], int]] = None) -> None:
        super().__init__(maxsize, size_of)
        self._size_of = size_of

    def add(self, key: Hashable, value: Any) -> Any:
        """Keeps a result, unless it alone is larger than everything that may be kept.

        Args:
            key: What it was made of.
            value: The result.

        Returns:
            The result.
        """
        if self.getsizeof(value) <= self.maxsize:
            self[key] = value
        else:
            self.pop(key, None)
        return value

    def __copy__(self) -> Memo:
        return Memo(int(self.maxsize), self._size_of)

    def __reduce__(self) -> tuple:
        return Memo, (self.maxsize, self._size_of)

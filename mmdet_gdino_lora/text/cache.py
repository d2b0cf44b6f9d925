"""Features of a frozen text encoder, remembered per segment."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Optional

from torch import Tensor


class SegmentCache:
    """Keeps the latest features within a number of bytes; the least recently used go first.

    It belongs to one module in one process: copied or pickled, it arrives empty, and it is in no
    state dict.

    Args:
        max_bytes: Most bytes of features to keep, on whatever device they are. 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._features: OrderedDict[Hashable, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._features)

    def get(self, key: Hashable) -> Optional[Tensor]:
        """Remembered features.

        Args:
            key: Under which they were put.

        Returns:
            The features, or None.
        """
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
        return features

    def put(self, key: Hashable, features: Tensor) -> None:
        """Remembers features.

        Args:
            key: Everything that they depend on, the weights aside.
            features: Must own its memory: a view would keep its whole batch alive.
        """
        self._drop(key)
        self._features[key] = features
        self.nbytes += features.nbytes
        while self.nbytes > self.max_bytes:
            self._drop(next(iter(self._features)))

    def clear(self) -> None:
        """Forgets everything, as it must when the weights have changed."""
        self._features.clear()
        self.nbytes = 0

    def _drop(self, key: Hashable) -> None:
        features = self._features.pop(key, None)
        if features is not None:
            self.nbytes -= features.nbytes

    def __reduce__(self) -> tuple:
        return SegmentCache, (self.max_bytes,)

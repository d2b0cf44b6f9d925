"""What a person most likely meant by a word that nothing here is called."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], likeness: float = 0.6) -> str:
    """Finds the known word that resembles another one most.

    Args:
        word: As it was typed.
        known: Words that mean something.
        likeness: Least ratio of :class:`difflib.SequenceMatcher`, between 0 and 1.

    Returns:
        The known word; empty where none is near.
    """
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=likeness)
    return found[0] if found else ''

"""Reads the score thresholds that a report has chosen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Optional

from mmdet_gdino_lora.errors import ConfigError


def lowest_scores(path: Optional[str], names: Sequence[str], otherwise: float) -> list[float]:
    """The lowest score of each class that is shown.

    Args:
        path: ``--thresholds``: JSON, a number or null by class name; None: there is none.
        names: Of the classes.
        otherwise: Of classes that the file says nothing of.

    Returns:
        A score for each name.

    Raises:
        ConfigError: The file is none of a report's, or of none of these classes.
    """
    scores = [None] * len(names) if path is None else chosen_scores(path, names)
    return [otherwise if score is None else score for score in scores]


def chosen_scores(path: str, names: Sequence[str]) -> list[Optional[float]]:
    """The score that a report has chosen for each class.

    Args:
        path: ``--thresholds``: JSON, a number or null by class name.
        names: Of the classes.

    Returns:
        A score for each name; None where the file says nothing of it.

    Raises:
        ConfigError: The file is none of a report's, or of none of these classes.
    """
    scores = read_scores(path)
    if not set(names) & set(scores):
        raise ConfigError(
            f'--thresholds {path!r} knows none of {", ".join(names)}: it has '
            f'{", ".join(list(scores)[:10])}'
        )
    return [scores.get(name) for name in names]


def read_scores(path: str) -> dict[str, Optional[float]]:
    """Reads the file that a report has written.

    Args:
        path: ``--thresholds``: JSON, a number or null by class name.

    Returns:
        A score by class name; None where validation could not say.

    Raises:
        ConfigError: The file is none of a report's.
    """
    try:
        with open(path, encoding='utf-8') as file:
            scores = json.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f'--thresholds {path!r}: {error}; give the thresholds.json that `gdino-lora report` '
            'has written'
        ) from error
    kinds = (int, float, type(None))
    if not isinstance(scores, dict) or not all(isinstance(s, kinds) for s in scores.values()):
        raise ConfigError(
            f'--thresholds {path!r} is no number by class name; give the thresholds.json that '
            '`gdino-lora report` has written'
        )
    return {name: None if score is None else float(score) for name, score in scores.items()}

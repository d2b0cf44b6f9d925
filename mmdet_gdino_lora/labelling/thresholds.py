"""From which score on a detection is a label: one threshold for all classes, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

from mmdet_gdino_lora.checks.nearest import nearest
from mmdet_gdino_lora.checks.words import some
from mmdet_gdino_lora.errors import ConfigError

#: Where none is given.
USUAL = 0.3


def read_thresholds(words: Sequence[str], names: Sequence[str]) -> list[Optional[float]]:
    """Reads thresholds as they are typed.

    Args:
        words: Such as ``0.3`` for all classes, and ``wheel bolt=0.45`` for one.
        names: Class names.

    Returns:
        One for each class; None for a class of which nothing is said.

    Raises:
        ConfigError: A class is unknown, or a threshold is no score.
    """
    for_all: Optional[float] = None
    own: dict[str, float] = {}
    for word in words:
        name, equals, number = word.rpartition('=')
        if equals and name not in names:
            near = nearest(name, names)
            meant = f'did you mean {near!r}?' if near else f'it has {some(names, 20)}'
            raise ConfigError(f'--threshold {word!r}: the config has no class {name!r}; {meant}')
        try:
            score = float(number)
        except ValueError:
            score = -1.0
        if not 0 <= score <= 1:
            raise ConfigError(
                f'--threshold {word!r}: {number!r} is no score between 0 and 1; write 0.3, or '
                f'"{names[0]}=0.3" for one class'
            )
        if equals:
            own[name] = score
        else:
            for_all = score
    return [own.get(name, for_all) for name in names]

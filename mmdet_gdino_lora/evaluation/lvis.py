"""LVIS's own evaluation on today's numpy.

The package ``lvis`` 0.5.3 is its last release and asks numpy for ``np.float``, which numpy 1.24
took away: every evaluation ends in an AttributeError, after all images. Its module of evaluation is
given numpy under a name that still knows the old words; numpy itself, mmdet and everybody else who
uses them stay as they are.
"""

from __future__ import annotations

import importlib
import warnings
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

OLD_NAMES: dict[str, type] = dict(bool=bool, float=float, int=int, object=object)
"""Python's types, by the names that numpy had for them."""


class NumpyWithOldNames(ModuleType):
    """numpy, and what it no longer has of :data:`OLD_NAMES`."""

    def __getattr__(self, name: str) -> Any:
        return OLD_NAMES[name] if name in OLD_NAMES else getattr(np, name)


def mend_lvis() -> None:
    """Lets ``lvis.eval`` find the names that numpy took away, if it is installed and needs them."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # numpy 1.23 has them, and calls them deprecated
        if hasattr(np, 'float') or find_spec('lvis') is None:
            return
    # mmdet's metrics have imported it already.
    importlib.import_module('lvis.eval').np = NumpyWithOldNames('numpy')  # type: ignore[attr-defined]

"""The detector of a run, which several ranks wrap."""

from __future__ import annotations

from typing import Any

from mmengine.model import is_model_wrapper


def detector_of(runner: Any) -> Any:
    """Finds the detector that a run trains.

    Args:
        runner: mmengine's runner.

    Returns:
        Its model, without the wrapper of several ranks.
    """
    return runner.model.module if is_model_wrapper(runner.model) else runner.model

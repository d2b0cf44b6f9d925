"""A run that begins anew in the folder of an earlier one keeps that one's checkpoints."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from typing import Any

from mmengine.logging import MMLogger

from mmdet_gdino_lora.checks.folder import LATEST, checkpoint_folder, earlier_checkpoints
from mmdet_gdino_lora.checks.ranks import rank


def set_aside(cfg: Mapping[str, Any]) -> str:
    """Moves the checkpoints that a run would write over into a folder beside them, and says so.

    Args:
        cfg: The runner's config.

    Returns:
        The folder that they lie in now; empty where there was nothing to move.
    """
    names = earlier_checkpoints(cfg)
    if not names or rank() != 0:
        return ''
    folder = checkpoint_folder(cfg)
    numbered = (os.path.join(folder, f'earlier_{number}') for number in itertools.count(1))
    aside = next(path for path in numbered if not os.path.lexists(path))
    os.makedirs(aside)
    adapters = [f'{os.path.splitext(name)[0]}_adapter' for name in names]
    for name in [*names, *adapters, LATEST]:
        if os.path.lexists(os.path.join(folder, name)):
            os.replace(os.path.join(folder, name), os.path.join(aside, name))
    MMLogger.get_current_instance().warning(
        f'work_dir={folder!r} held {len(names)} checkpoint{"s" * (len(names) > 1)} of an earlier '
        f'run, which this one would write over; they were moved to {aside!r} (first: {names[0]}); '
        'to go on with a run instead of beginning anew, type --resume'
    )
    return aside

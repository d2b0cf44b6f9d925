"""The disk that kept features take: told and refused before the first of them is written."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.frozen.recipe import kept_files

GB = 10**9

_STALE = 3600.0
"""Seconds after which a file that is still being written is nobody's."""


def check_space(folder: str, files: int, bytes_each: float, views: int) -> str:
    """Compares what features will take with what the disk has.

    Args:
        folder: Of the features.
        files: That there will be in the end.
        bytes_each: Of a file.
        views: Of every image, for the message.

    Returns:
        A sentence for the log.

    Raises:
        ConfigError: The disk has less.
    """
    there = sum(path.stat().st_size for path in kept_files(folder))
    needed = max(0.0, files * bytes_each - there)
    free = shutil.disk_usage(_existing(folder)).free
    said = (
        f'features of {files} views ({views} of an image, {bytes_each / 10**6:.1f} MB each) take '
        f'{files * bytes_each / GB:.1f} GB in {folder}'
    )
    if needed > free:
        raise ConfigError(
            f'FrozenFeaturesHook: {said}, and that disk has {free / GB:.1f} GB left; choose fewer '
            'views, or another folder'
        )
    return f'{said}, of which {there / GB:.1f} GB are there; the disk has {free / GB:.1f} GB left.'


def remove_unfinished(folder: str) -> None:
    """Removes what runs that were killed had begun to write.

    Args:
        folder: Of the features, which another run may be writing to now.
    """
    for path in Path(folder).glob('[0-9a-f][0-9a-f]/.*.partial'):
        try:
            if time.time() - path.stat().st_mtime > _STALE:
                path.unlink()
        except FileNotFoundError:  # another run has finished it
            continue


def _existing(folder: str) -> str:
    """The folder, or the nearest one above it that is there."""
    path = os.path.abspath(folder)
    while not os.path.isdir(path):
        path = os.path.dirname(path)
    return path

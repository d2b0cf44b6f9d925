"""An image that can't be read when its turn comes: another takes its place, and it is told.

Files are looked at before a run starts, and go bad after that: a disk fails, a folder is moved.
Workers put the paths onto the sample that took the place; the main process counts them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, Optional

import mmcv
import numpy as np
from mmengine.fileio import get
from mmengine.logging import MMLogger

from mmdet_gdino_lora.errors import ConfigError

KEY = 'unreadable'
"""Meta information of a sample: the paths of the images in whose place it stands."""

ATTEMPTS = 100
"""Unreadable images of one visit, the same ones drawn again included."""


def readable_sample(dataset: Any, index: Any, most: int) -> Any:
    """Makes a sample, of another image where the one that was asked for can't be read.

    Args:
        dataset: The data set.
        index: Of the sample.
        most: Most images that may be unreadable, one after the other.

    Returns:
        The sample. Which one takes a place is drawn from numpy's generator.

    Raises:
        ConfigError: After so many unreadable images.
    """
    paths: list[str] = []
    while True:
        try:
            sample = dataset[index]
            break
        except Exception as error:
            path = _unreadable(dataset, index, error)
            if path is None:
                raise
            paths.append(path)
            different = list(dict.fromkeys(paths))
            if len(different) > most or len(paths) > ATTEMPTS:
                raise ConfigError(_too_many(different, most)) from error
        index = np.random.randint(len(dataset))  # noqa: NPY002 - seeded by the visit
    if paths and isinstance(sample, Mapping) and hasattr(sample.get('data_samples'), 'metainfo'):
        sample['data_samples'].set_metainfo({KEY: tuple(paths)})
    return sample


class UnreadableImages:
    """Counts them, tells each once, and ends the run when there are too many.

    Args:
        most: Different images that may be unreadable.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._paths: dict[str, None] = {}
        self._samples = 0

    def look(self, batch: Any) -> None:
        """Looks at a batch.

        Args:
            batch: As the loader hands it over.

        Raises:
            ConfigError: There are more of them than may be.
        """
        samples = batch.get('data_samples') if isinstance(batch, Mapping) else None
        for sample in samples or ():
            for path in sample.metainfo.get(KEY, ()) if hasattr(sample, 'metainfo') else ():
                self._samples += 1
                if path not in self._paths:
                    self._paths[path] = None
                    self._tell(path)

    def _tell(self, path: str) -> None:
        count = len(self._paths)
        if count > self._most:
            raise ConfigError(_too_many(list(self._paths), self._most))
        # Formatted here: mmengine's logger says what has one pattern once.
        MMLogger.get_current_instance().warning(
            f'{path} can no longer be read; another image takes its place ({count} of at most '
            f'{self._most} such images, {self._samples} samples so far).'
        )


def _too_many(paths: list[str], most: int) -> str:
    named = ', '.join(paths[:5]) + (', ...' if len(paths) > 5 else '')
    return (
        f'images that were there when the run began can no longer be read ({len(paths)} with '
        f'max_unreadable={most} of ResumableSeedHook): {named}; '
        'look at the disk and the folder, put the files back and go on with --resume'
    )


def _unreadable(dataset: Any, index: Any, error: Exception) -> Optional[str]:
    """The image file that an error is about, if it can't be read indeed."""
    named = [getattr(error, 'filename', None), str(error).partition('failed to load image: ')[2]]
    with contextlib.suppress(Exception):  # without it, what the error names has to do
        named.append(dataset.get_data_info(index).get('img_path'))
    return next((str(path) for path in named if path and not can_be_read(str(path))), None)


def can_be_read(path: str) -> bool:
    """Tells whether a file is an image that mmcv decodes.

    Args:
        path: Of the file.
    """
    try:
        return mmcv.imfrombytes(get(path)) is not None
    except Exception:
        return False

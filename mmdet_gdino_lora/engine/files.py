"""A run's folder: which checkpoint is the last, and what is said when the disk takes no more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from mmdet_gdino_lora.engine.atomic import atomic
from mmdet_gdino_lora.errors import ConfigError

PREEMPTED = 'preempted.pth'
"""The checkpoint of a run that was asked to end."""


class DiskFullError(ConfigError):
    """Something could not be written. The message says what was kept, and what to do."""


def name_last(work_dir: str, path: str) -> None:
    """Names the checkpoint that ``--resume`` goes on from.

    Args:
        work_dir: Of the run.
        path: Of a checkpoint that is complete.
    """
    with (
        atomic(os.path.join(work_dir, 'last_checkpoint')) as partial,
        open(partial, 'w', encoding='utf-8') as file,
    ):
        file.write(path)


def last_checkpoint(work_dir: str) -> str:
    """Reads which checkpoint ``--resume`` goes on from.

    Args:
        work_dir: Of the run.

    Returns:
        Its path; empty where there is none.
    """
    try:
        with open(os.path.join(work_dir, 'last_checkpoint'), encoding='utf-8') as file:
            return file.read().strip()
    except OSError:
        return ''


@contextmanager
def disk_is_full(what: str, work_dir: str, partial_folder: str = '') -> Iterator[None]:
    """Says in one sentence that something could not be written.

    Args:
        what: Is being written.
        work_dir: Of the run.
        partial_folder: Is removed, for it isn't whole.

    Raises:
        DiskFullError: In place of the system's error.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        if partial_folder:
            shutil.rmtree(partial_folder, ignore_errors=True)
        last = last_checkpoint(work_dir)
        whole = bool(last) and os.path.isfile(last)
        kept = (
            f'{last} and what was saved before it are whole' if whole else 'nothing was saved yet'
        )
        reason = getattr(error, 'strerror', None) or str(error)
        remedy = 'look at that disk and folder'
        if any(word in reason for word in ('space', 'quota', 'large')):
            remedy = (
                'free space on that disk (default_hooks.checkpoint.max_keep_ckpts keeps fewer '
                'checkpoints)'
            )
        raise DiskFullError(
            f'{what} could not be written ({reason}); {kept}; {remedy} and '
            f'{"go on with --resume" if whole else "start again"}'
        ) from error

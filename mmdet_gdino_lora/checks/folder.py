"""A run's folder: can it be written, what would be overwritten, and where does a run go on?"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, Optional

from mmdet_gdino_lora.checks.findings import Finding

LATEST = 'last_checkpoint'
"""The file in which mmengine notes the checkpoint to go on from."""


def check_folder(work_dir: str) -> Iterator[Finding]:
    """Checks that a run can write where it is told to; nothing is left there.

    Args:
        work_dir: The run's folder, which need not exist yet.

    Yields:
        What was found.
    """
    place = os.path.abspath(work_dir)
    while not os.path.lexists(place):
        place = os.path.dirname(place)
    if not os.path.isdir(place):
        yield Finding(
            f'work_dir={work_dir!r}: {place!r} is a file, and checkpoints need a folder; choose '
            'another with --work-dir or work_dir',
            fatal=True,
        )
        return
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding(
            f'work_dir={work_dir!r}: {place!r} cannot be written ({error.strerror}); choose '
            'another folder with --work-dir or work_dir',
            fatal=True,
        )


def check_overwriting(cfg: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks that a run that begins anew has no earlier run's checkpoints to write over.

    Args:
        cfg: The runner's config.

    Yields:
        What was found.
    """
    folder = cfg.get('work_dir')
    if not folder or cfg.get('resume'):
        return
    hook = (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    if hook.get('out_dir'):
        folder = os.path.join(hook['out_dir'], os.path.basename(str(folder).rstrip('/')))
    earlier = checkpoints(folder, hook.get('filename_tmpl'))
    if earlier:
        yield Finding(
            f'work_dir={folder!r} holds {len(earlier)} checkpoint{"s" * (len(earlier) > 1)} of an '
            f'earlier run, which this one would write over ({", ".join(earlier[:4])}'
            f'{", ..." if len(earlier) > 4 else ""}); go on with that run by --resume, choose '
            'another folder with --work-dir, or move them away',
            fatal=True,
        )


def checkpoints(folder: str, template: Optional[str] = None) -> list[str]:
    """Lists the checkpoints in a run's folder.

    Args:
        folder: It need not exist.
        template: mmengine's ``filename_tmpl``, where it is not the usual one.

    Returns:
        Names of files, those of the last iteration or epoch last, the best ones behind them.
    """
    written = [r'epoch_(\d+)\.pth', r'iter_(\d+)\.pth']
    if template and '{}' in template:
        written.append(re.escape(template).replace(r'\{\}', r'(\d+)'))
    numbers: dict[str, int] = {}
    best = []
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else ():
        found = next(filter(None, (re.fullmatch(pattern, name) for pattern in written)), None)
        if found:
            numbers[name] = int(found[1])
        elif name.startswith('best_') and name.endswith('.pth'):
            best.append(name)
    return sorted(numbers, key=lambda name: numbers[name]) + best


def check_latest(work_dir: str, key: str = '--resume') -> Iterator[Finding]:
    """Checks that a run that goes on from the latest checkpoint of its folder finds one.

    Args:
        work_dir: The run's folder.
        key: What asked for it.

    Yields:
        What was found.
    """
    note = os.path.join(work_dir, LATEST)
    if os.path.isfile(note):
        with open(note, encoding='utf-8') as file:
            latest = file.read().strip()
        if not os.path.isfile(latest) and '://' not in latest:
            there = os.path.join(work_dir, os.path.basename(latest))
            found = there if os.path.isfile(there) else 'CHECKPOINT'
            yield Finding(
                f'{key}: {note} names {latest!r}, which is not there (any more); name the '
                f'checkpoint to go on from: --resume {found}',
                fatal=True,
            )
        return
    numbered = [name for name in checkpoints(work_dir) if not name.startswith('best_')]
    if numbered:
        yield Finding(
            f'{key}: {note}, which would name the checkpoint to go on from, is not there; name it: '
            f'--resume {os.path.join(work_dir, numbered[-1])}',
            fatal=True,
        )
        return
    yield Finding(
        f'{key}: there is no checkpoint in {work_dir!r} to go on from, and the run begins anew; if '
        'there should be one, name it (--resume CHECKPOINT) or its folder (--work-dir)'
    )

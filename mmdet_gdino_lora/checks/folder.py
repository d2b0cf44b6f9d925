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
    """Checks that a run that begins anew does not begin from what it would write over.

    Args:
        cfg: The runner's config.

    Yields:
        What was found.
    """
    folder = checkpoint_folder(cfg)
    model = cfg.get('model') or {}
    sources = {
        'load_from': cfg.get('load_from'),
        'model.base_checkpoint': model.get('base_checkpoint'),
    }
    for name in earlier_checkpoints(cfg):
        path = os.path.join(folder, name)
        for key, source in sources.items():
            if source and os.path.exists(source) and os.path.samefile(source, path):
                yield Finding(
                    f'{key}={source!r} lies in work_dir={folder!r}, where this run would write '
                    'over it; choose another folder with --work-dir, or go on with that run by '
                    '--resume',
                    fatal=True,
                )


def checkpoint_folder(cfg: Mapping[str, Any]) -> str:
    """Tells where a run writes its checkpoints.

    Args:
        cfg: The runner's config.

    Returns:
        ``work_dir``, or what the checkpoint hook's ``out_dir`` makes of it; empty without either.
    """
    folder = str(cfg.get('work_dir') or '')
    out_dir = _checkpoint_hook(cfg).get('out_dir')
    return os.path.join(out_dir, os.path.basename(folder.rstrip('/'))) if out_dir else folder


def earlier_checkpoints(cfg: Mapping[str, Any]) -> list[str]:
    """Lists the checkpoints that a run which begins anew would write over.

    Args:
        cfg: The runner's config.

    Returns:
        Names of files in :func:`checkpoint_folder`; none for a run that goes on.
    """
    folder = checkpoint_folder(cfg)
    if cfg.get('resume') or not folder:
        return []
    return checkpoints(folder, _checkpoint_hook(cfg).get('filename_tmpl'))


def _checkpoint_hook(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    return (cfg.get('default_hooks') or {}).get('checkpoint') or {}


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

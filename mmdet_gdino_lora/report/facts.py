"""What a page about a run says in words: what was trained on what, and who wrote it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Optional

from mmdet.registry import DATASETS

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.read import read_file
from mmdet_gdino_lora.lora import describe, lora_state
from mmdet_gdino_lora.report.collect import Run
from mmdet_gdino_lora.report.detect import count

if TYPE_CHECKING:
    from mmengine.config import Config


def about_model(detector: Any, run: Run) -> Iterator[tuple[str, str]]:
    """What was trained, on what base, and which checkpoint this is.

    Args:
        detector: With the checkpoint loaded.
        run: The run.

    Yields:
        A name, and what the page says of it.
    """
    state = lora_state(detector)
    yield 'base', str(state.base or 'none: trained from random weights')
    if state.config:
        yield (
            'adapter',
            f'preset {state.preset}, rank {state.config.r}, alpha {state.config.lora_alpha:g}, '
            f'{len(state.targets)} modules',
        )
        report = describe(detector)
        yield 'trained', f'{report.num_trained:,} of {report.total:,} parameters'
    when = ''
    if os.path.isfile(run.checkpoint):
        meta = read_file(run.checkpoint).get('meta', {})
        parts = [f'{key} {meta[key]}' for key in ('epoch', 'iter', 'time') if key in meta]
        when = f' ({", ".join(parts)})' if parts else ''
    yield 'checkpoint', f'{run.checkpoint}{when}'
    yield 'config', run.config


def training_set(
    cfg: Config, names: Sequence[str]
) -> tuple[tuple[str, str], Optional[Sequence[int]]]:
    """What was trained on.

    Args:
        cfg: The run's config.
        names: Classes of the validation set.

    Returns:
        The page's line, and the number of boxes of each class; None where the training set isn't
        at hand or has other classes.
    """
    line = 'training set'
    if not cfg.get('train_dataloader'):
        return (line, 'none in the config'), None
    inner = cfg.train_dataloader.dataset
    while 'dataset' in inner:
        inner = inner['dataset']
    try:
        dataset = DATASETS.build(inner)
    except (OSError, ConfigError) as error:
        return (line, f'could not be read: {error}'), None
    images, boxes = count(dataset)
    same = tuple(dataset.metainfo.get('classes') or ()) == tuple(names)
    told = f'{images:,} images, {boxes.sum():,} boxes ({getattr(dataset, "ann_file", "")})'
    return (line, told), boxes.tolist() if same else None


def about_data(dataset: Any, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is validated on, and for which classes.

    Args:
        dataset: Of validation.
        names: Its classes.

    Yields:
        A name, and what the page says of it.
    """
    images, boxes = count(dataset)
    file = getattr(dataset, 'ann_file', '')
    yield 'validation set', f'{images:,} images, {boxes.sum():,} boxes ({file})'
    yield 'classes', f'{len(names)}: {", ".join(names)}'


def about_report() -> Iterator[tuple[str, str]]:
    """Which version has written the page, and when.

    Yields:
        A name, and what the page says of it.
    """
    folder, version = os.path.dirname(os.path.dirname(__file__)), 'a copy without installation'
    for installed in metadata.Distribution.discover(name='mmdet-gdino-lora'):
        version = installed.version
    try:
        # In a folder that git doesn't know as its own, its commit would be somebody else's.
        tracked = ['git', '-C', folder, 'ls-files', '--error-unmatch', 'errors.py']
        subprocess.run(tracked, capture_output=True, check=True)
        head = ['git', '-C', folder, 'rev-parse', '--short=10', 'HEAD']
        done = subprocess.run(head, capture_output=True, check=True, text=True)
        version += f', commit {done.stdout.strip()}'
    except (OSError, subprocess.CalledProcessError):  # a wheel, or no git
        pass
    yield 'page written', f'{time.strftime("%Y-%m-%d %H:%M")} by mmdet-gdino-lora {version}'


def validations_are_of_epochs(cfg: Config) -> bool:
    """Tells what the logger numbers validations by, as mmengine's hook does.

    Args:
        cfg: The run's config.
    """
    hooks = cfg.get('default_hooks') or {}
    return bool((hooks.get('logger') or {}).get('log_metric_by_epoch', True))

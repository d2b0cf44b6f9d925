"""Writes a page about a training run: what was trained, how good it is, and where it errs.

report.py WORK_DIR [--checkpoint X] [--old-config CONFIG] [--scales 0 0.25 0.5 0.75 1]

Runs the detector once on the validation set of the run's config. WORK_DIR/report.html opens from
disk and needs nothing beside it; WORK_DIR/thresholds.json holds each class's best score threshold.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any, Optional

from mmdet_gdino_lora.commands.common import config_file, read_arguments
from mmdet_gdino_lora.errors import ConfigError

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmdet_gdino_lora.report.collect import Run


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    args = read_arguments(own_parser(), argv)

    from mmdet.utils import register_all_modules

    from gdino_lora import COMMANDS
    from mmdet_gdino_lora.commands.image_demo import load
    from mmdet_gdino_lora.engine.preflight import check_config
    from mmdet_gdino_lora.report import page
    from mmdet_gdino_lora.report.collect import read_run
    from mmdet_gdino_lora.report.detect import detect, validation_set
    from mmdet_gdino_lora.report.measure import Measurement
    from mmdet_gdino_lora.report.pictures import best_and_worst

    if not all(0 <= scale <= 1 for scale in args.scales):
        raise ConfigError(f'--scales {args.scales}: give numbers between 0 and 1')
    run = read_run(args.work_dir, args.checkpoint)
    cfg = config_file(run.config)
    if not cfg.get('test_dataloader'):
        cfg.test_dataloader = cfg.get('val_dataloader')
    register_all_modules()
    if cfg.get('val_dataloader'):
        check_config(cfg, ['val'])
    dataset = validation_set(cfg)
    detector, _ = load(cfg, run.checkpoint, args.device)
    names = dataset.metainfo['classes']
    measurement = Measurement(detect(detector, dataset, cfg.val_dataloader), names)
    verdicts = measurement.verdicts()
    best, worst = best_and_worst(measurement, verdicts, args.pictures)
    trained, boxes = training_set(cfg, names)
    facts = [*about_model(detector, run), trained, *about_data(dataset, names), *about_report()]
    rows = strengths(run, args)
    thresholds = os.path.join(run.folder, 'thresholds.json')
    page.write_thresholds(thresholds, measurement)
    out = os.path.join(run.folder, 'report.html')
    page.write(
        out,
        measurement,
        title=page.title(run),
        facts=facts,
        trained_boxes=boxes,
        charts=page.charts(run, validations_are_of_epochs(cfg)),
        best=best,
        worst=worst,
        scales=page.scales(rows),
        scale_rows=rows,
        confusion=page.confusion(measurement.confusion(verdicts), names),
        thresholds=thresholds,
        commands=page.commands(run, names, thresholds, list(COMMANDS)),
    )
    print(f'written: {out} and {thresholds}')


def own_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(description='Write a page about a training run')
    arguments.add_argument('work_dir', help="the run's folder; the page is written there")
    arguments.add_argument(
        '--checkpoint', help='what to measure; default: the best one in there, or else the last'
    )
    arguments.add_argument('--pictures', type=int, default=4, help='how many of the best and worst')
    arguments.add_argument('--device', help='default: cuda where there is one, else cpu')
    arguments.add_argument(
        '--old-config', help='config whose test set holds what the base knew: before and after'
    )
    arguments.add_argument(
        '--scales',
        type=float,
        nargs='+',
        default=[],
        help='strengths of the adapter to measure on the test set, such as 0 0.25 0.5 0.75 1; '
        'an evaluation each',
    )
    return arguments


def about_model(detector: Any, run: Run) -> Iterator[tuple[str, str]]:
    """What was trained, on what base, and which checkpoint this is.

    Args:
        detector: With the checkpoint loaded.
        run: The run.

    Yields:
        A name, and what the page says of it.
    """
    from mmdet_gdino_lora.files.read import read_file
    from mmdet_gdino_lora.lora import describe, lora_state

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
    from mmdet.registry import DATASETS

    from mmdet_gdino_lora.report.detect import count

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
    from mmdet_gdino_lora.report.detect import count

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


def strengths(run: Run, args: argparse.Namespace) -> list[dict[str, float]]:
    """Measures the adapter at several strengths, where that was asked for.

    Args:
        run: The run.
        args: Of the command line. With ``--old-config`` alone: before and after.

    Returns:
        Rows of ``sweep``; empty where it wasn't.
    """
    from mmdet_gdino_lora.commands.sweep_scale import sweep

    if not args.scales and not args.old_config:
        return []
    configs = dict(new=run.config, **(dict(old=args.old_config) if args.old_config else {}))
    out = os.path.join(run.folder, 'report_scales')
    return list(sweep(configs, run.checkpoint, args.scales or [0, 1], out))

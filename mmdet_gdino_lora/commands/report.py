"""Writes a page about a training run: what was trained, how good it is, and where it errs.

report.py WORK_DIR [--checkpoint X] [--old-config CONFIG] [--scales 0 0.25 0.5 0.75 1]

Runs the detector once on the validation set of the run's config. WORK_DIR/report.html opens from
disk and needs nothing beside it; WORK_DIR/thresholds.json holds each class's best score threshold.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from mmdet_gdino_lora.commands.common import config_file, read_arguments
from mmdet_gdino_lora.errors import ConfigError

if TYPE_CHECKING:
    from mmdet_gdino_lora.report.collect import Run


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    args = read_arguments(own_parser(), argv)

    from mmdet.utils import register_all_modules

    from mmdet_gdino_lora.commands.image_demo import load
    from mmdet_gdino_lora.engine.preflight import check_config
    from mmdet_gdino_lora.report.collect import read_run
    from mmdet_gdino_lora.report.detect import validation_set
    from mmdet_gdino_lora.report.whole import write_report

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
    rows = strengths(run, args)  # before another detector is there
    detector, _ = load(cfg, run.checkpoint, args.device)
    written = write_report(run, cfg, detector, dataset, args.pictures, rows)
    print(f'written: {written.page} and {written.thresholds}')


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

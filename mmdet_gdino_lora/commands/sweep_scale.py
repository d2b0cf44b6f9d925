"""Measures an adapter at several strengths, on the new task and on what the base knew.

sweep_scale.py CONFIG ADAPTER [--old-config CONFIG] [--scales 0 0.25 0.5 0.75 1] [--out FOLDER]

Evaluates CONFIG's test set, and --old-config's where given (the config that the base was trained
with, say), with the base and the adapter mixed at every scale; prints a table, and writes it as
sweep.json beside a drawing of the curve, sweep.png.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Optional

from mmdet_gdino_lora.commands.common import (
    add_cfg_options,
    build_runner,
    read_arguments,
    read_config,
)
from mmdet_gdino_lora.commands.merge_adapter import load_tuned
from mmdet_gdino_lora.errors import ConfigError

if TYPE_CHECKING:
    from mmengine.runner import Runner


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    arguments = argparse.ArgumentParser(description='Measure an adapter at several strengths')
    arguments.add_argument('config', help='config file that the adapter was trained with')
    arguments.add_argument('adapter', help='checkpoint of a training run')
    arguments.add_argument('--old-config', help='config whose test set holds what the base knew')
    arguments.add_argument('--scales', type=float, nargs='+', default=[0, 0.25, 0.5, 0.75, 1])
    arguments.add_argument('--metric', help='coco/bbox_mAP_50, say; default: the first there is')
    arguments.add_argument('--out', default='work_dirs/sweep', help='folder to write')
    add_cfg_options(arguments)
    args = read_arguments(arguments, argv)

    if not all(0 <= scale <= 1 for scale in args.scales):
        raise ConfigError(f'--scales {args.scales}: give numbers between 0 and 1')
    configs = {'new': args.config}
    if args.old_config:
        configs['old'] = args.old_config
    rows = []
    for row in sweep(configs, args.adapter, args.scales, args.out, args.cfg_options, args.metric):
        rows.append(row)
        print(table(rows), flush=True)
        os.makedirs(args.out, exist_ok=True)
        with open(os.path.join(args.out, 'sweep.json'), 'w', encoding='utf-8') as file:
            json.dump(rows, file, indent=2)
    draw(rows, os.path.join(args.out, 'sweep.png'))
    print(f'written: {args.out}/sweep.json and sweep.png')


def sweep(
    configs: Mapping[str, str],
    adapter: str,
    scales: Sequence[float],
    out: str,
    options: dict | None = None,
    metric: str | None = None,
) -> Iterator[dict[str, float]]:
    """Tests the base and the adapter mixed at every scale.

    Args:
        configs: ``new``, the config that the adapter was trained with, and whatever else is
            tested; each on its test set.
        adapter: Checkpoint of a training run.
        scales: Between 0, the base, and 1.
        out: Folder for logs.
        options: ``--cfg-options``.
        metric: As for :func:`measure`.

    Yields:
        For each scale, ``scale`` and the metric of each config by its name.
    """
    from mmdet_gdino_lora.lora.store.merge import merged_weights

    detector, _ = load_tuned(configs['new'], adapter, options)
    runners = {
        side: plain_runner(config, os.path.join(out, side), options)
        for side, config in configs.items()
    }
    for scale in sorted(set(scales)):
        weights = merged_weights(detector, scale)
        measured = {side: measure(runner, weights, metric) for side, runner in runners.items()}
        yield dict(scale=scale, **measured)


def plain_runner(config: str, work_dir: str, options: dict | None = None) -> Runner:
    """Builds a runner that tests a detector without adapters and without a base of its own.

    Args:
        config: Config file; its model and its test set are used.
        work_dir: For logs.
        options: ``--cfg-options``.

    Returns:
        mmengine's ``Runner``.
    """
    cfg = read_config(config, options, work_dir)
    cfg.load_from, cfg.resume = None, False
    if cfg.model.type == 'LoRAGroundingDINO':
        cfg.model.update(lora=None, retain=None, base_checkpoint=None, base_dtype='float32')
    for stage in ('train', 'val'):
        for part in ('dataloader', 'cfg', 'evaluator'):
            cfg[f'{stage}_{part}'] = None
    cfg.optim_wrapper = cfg.param_scheduler = None
    return build_runner(cfg)


def measure(runner: Runner, weights: dict, metric: str | None) -> float:
    """Tests the weights.

    Args:
        runner: See :func:`plain_runner`.
        weights: By plain name.
        metric: Which of the evaluator's to return; None: the first.

    Returns:
        The metric.
    """

    own = dict(runner.model.named_parameters())
    fitting = {n: w for n, w in weights.items() if n not in own or own[n].shape == w.shape}
    runner.model.load_state_dict(fitting, strict=False)
    metrics = runner.test()
    if metric is None:
        metric = next(iter(metrics))
    if metric not in metrics:
        raise ConfigError(f'--metric {metric!r}: the evaluator gives {", ".join(metrics)}')
    return float(metrics[metric])


def table(rows: list[dict]) -> str:
    """Writes the measurements as text.

    Args:
        rows: ``scale`` and a number for each side.

    Returns:
        One line for each row, under a heading.
    """
    lines = ['  '.join(f'{name:>6}' for name in rows[0])]
    lines += ['  '.join(f'{value:6.3f}' for value in row.values()) for row in rows]
    return '\n'.join(lines)


def draw(rows: list[dict], path: str) -> None:
    """Draws the measurements over the scale.

    Args:
        rows: ``scale`` and a number for each side.
        path: Picture to write.
    """
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout='constrained')
    names = dict(new='new task', old='what the base knew')
    for side in [name for name in rows[0] if name != 'scale']:
        values = [row[side] for row in rows]
        axes.plot([row['scale'] for row in rows], values, marker='o', label=names[side])
    axes.set_xlabel('scale of the adapter')
    axes.set_ylabel('AP')
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)

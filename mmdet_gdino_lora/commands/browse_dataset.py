"""Draws what the model will see of a data set: augmented images, boxes, and captions by token.

browse_dataset.py CONFIG [--split val] [--number 16] [--repeat 4] [-o FOLDER]

The pipeline runs as the config has it. What comes behind it, the detector's own normalising and
padding, isn't shown. Data that a run would stop at is told as the run would.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Optional

from mmdet_gdino_lora.commands.common import (
    add_cfg_options,
    add_overwrite,
    read_arguments,
    read_config,
    refuse_overwriting,
)
from mmdet_gdino_lora.errors import ConfigError


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    args = read_arguments(own_parser(), argv)
    for name in ('number', 'repeat'):
        if getattr(args, name) < 1:
            raise ConfigError(f'--{name} {getattr(args, name)}: give a number from 1 on')
    if args.seed < 0:
        raise ConfigError(f'--seed {args.seed}: give a number from 0 on')

    import numpy as np
    from mmdet.utils import register_all_modules

    from mmdet_gdino_lora.browse import page
    from mmdet_gdino_lora.browse.views import Views
    from mmdet_gdino_lora.checks.walk import datasets_of
    from mmdet_gdino_lora.engine.preflight import check_dataset

    refuse_overwriting('-o', [os.path.join(args.out, page.PAGE)], args.overwrite)
    cfg = read_config(args.config, args.cfg_options)
    register_all_modules()
    key = f'{args.split}_dataloader'
    for where, dataset in datasets_of(key, cfg.get(key)):
        check_dataset(where, dataset, cfg.get('model') or {})
    views = Views(cfg, args.split)
    chosen = np.random.default_rng(args.seed).permutation(len(views))[: args.number]
    drawn = (
        views.view(index, args.seed, draw)
        for index in sorted(chosen.tolist())
        for draw in range(args.repeat)
    )
    count = page.write(args.out, f'{args.config}, {args.split}', drawn)
    print(f'written: {count} pictures and {os.path.join(args.out, page.PAGE)}')


def own_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(
        description='Draw what the model will see: augmented images, boxes, captions by token'
    )
    arguments.add_argument('config', help='config file, or the name of one of ours')
    arguments.add_argument('--split', choices=['train', 'val', 'test'], default='train')
    arguments.add_argument('--number', type=int, default=16, help='how many images; default: 16')
    arguments.add_argument(
        '--repeat', type=int, default=1, help='draws of each image, to see the augmentation'
    )
    arguments.add_argument('--seed', type=int, default=0, help='which images, and which draws')
    arguments.add_argument(
        '-o', '--out', default='outputs/browse', help='folder to write; default: outputs/browse'
    )
    add_overwrite(arguments)
    add_cfg_options(arguments)
    return arguments

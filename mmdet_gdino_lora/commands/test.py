"""Tests a detector from a config and a checkpoint, with the arguments of mmdet's tools/test.py."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Optional

from mmdet_gdino_lora.commands.common import (
    build_runner,
    load_source,
    parser,
    read_arguments,
    read_config,
    read_source,
)
from mmdet_gdino_lora.errors import ConfigError

if TYPE_CHECKING:
    from mmengine.config import Config


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    arguments = parser('Test (and evaluate) a detector')
    arguments.add_argument(
        'checkpoint', help='checkpoint file, of adapters or of a whole model, or adapter folder'
    )
    arguments.add_argument('--out', help='write the predictions to this pickle file')
    arguments.add_argument('--show', action='store_true', help='show predictions in a window')
    arguments.add_argument(
        '--show-dir', help='write pictures with predictions to this folder in the work dir'
    )
    arguments.add_argument(
        '--wait-time', type=float, default=2, help='seconds that --show shows a picture'
    )
    arguments.add_argument('--tta', action='store_true', help='test time augmentation')
    args = read_arguments(arguments, argv)
    cfg = read_config(args.config, args.cfg_options, args.work_dir, args.launcher, args.local_rank)

    from mmdet.engine.hooks.utils import trigger_visualization_hook
    from mmdet.evaluation import DumpDetResults

    from mmdet_gdino_lora.engine.preflight import check_config

    if args.out is not None and not args.out.endswith(('.pkl', '.pickle')):
        raise ConfigError(f'--out {args.out}: predictions are written as a pickle; name it .pkl')
    keep_base(cfg)
    folder = os.path.isdir(args.checkpoint)
    cfg.load_from = None if folder else args.checkpoint
    cfg.resume = False
    if args.show or args.show_dir:
        cfg = trigger_visualization_hook(cfg, args)
    if args.tta:
        augment(cfg)
    if folder:
        read_source(args.checkpoint)
    check_config(cfg, ['test'])
    runner = build_runner(cfg)
    if folder:
        detector = runner.model
        while hasattr(detector, 'module'):  # test time augmentation, ranks
            detector = detector.module
        load_source(detector, args.checkpoint, None)
    if args.out is not None:
        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()


def keep_base(cfg: Config) -> None:
    """Moves the base out of ``load_from``, which is about to name the adapters' checkpoint.

    Args:
        cfg: Changed in place.
    """
    if cfg.model.type == 'LoRAGroundingDINO' and cfg.get('load_from'):
        cfg.model.setdefault('base_checkpoint', cfg.load_from)


def augment(cfg: Config) -> None:
    """Sets up mmdet's test time augmentation: as configured, else with and without a flip.

    Args:
        cfg: Changed in place.
    """
    from mmengine import ConfigDict

    if 'tta_model' not in cfg:
        nms = dict(type='nms', iou_threshold=0.5)
        cfg.tta_model = dict(type='DetTTAModel', tta_cfg=dict(nms=nms, max_per_img=100))
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    if 'tta_pipeline' not in cfg:
        pipeline = deepcopy(dataset.pipeline)
        flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
        packed = pipeline[-1]
        packed['meta_keys'] = tuple(
            dict.fromkeys([*packed.get('meta_keys', ()), 'flip', 'flip_direction'])
        )
        cfg.tta_pipeline = [
            *pipeline[:-1],
            dict(type='TestTimeAug', transforms=[flips, [packed]]),
        ]
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    dataset.pipeline = cfg.tta_pipeline

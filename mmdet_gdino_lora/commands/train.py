"""Trains a detector from a config, with the arguments of mmdet's own tools/train.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Optional

from mmdet_gdino_lora.commands.common import build_runner, parser, read_arguments, read_config
from mmdet_gdino_lora.errors import ConfigError

if TYPE_CHECKING:
    from mmengine.config import Config


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    arguments = parser('Train a detector')
    arguments.add_argument('--amp', action='store_true', help='automatic mixed precision (GPU)')
    arguments.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate to the batch size (auto_scale_lr in the config)',
    )
    arguments.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        help='go on from this checkpoint, or without a value from the latest in the work dir, '
        'where there is one',
    )
    args = read_arguments(arguments, argv)
    cfg = read_config(args.config, args.cfg_options, args.work_dir, args.launcher, args.local_rank)

    from mmengine.runner import find_latest_checkpoint

    from mmdet_gdino_lora.checks.findings import tell
    from mmdet_gdino_lora.checks.folder import check_latest
    from mmdet_gdino_lora.engine.earlier import set_aside
    from mmdet_gdino_lora.engine.preflight import check_config, check_start

    if args.amp:
        use_amp(cfg)
    if args.auto_scale_lr:
        if not {'enable', 'base_batch_size'} <= set(cfg.get('auto_scale_lr') or {}):
            raise ConfigError(
                f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size to scale '
                'from; add auto_scale_lr = dict(enable=False, base_batch_size=<images per step '
                'that its learning rate was chosen for>)'
            )
        cfg.auto_scale_lr.enable = True
    if args.resume == 'auto':
        # Where nothing was saved yet, the run begins as its config says, base included.
        tell(check_latest(cfg.work_dir))
        cfg.resume = find_latest_checkpoint(cfg.work_dir) is not None
        cfg.load_from = None if cfg.resume else cfg.get('load_from')
    elif args.resume is not None:
        cfg.resume = True
        cfg.load_from = args.resume
    check_config(cfg)
    check_start(cfg)
    runner = build_runner(cfg)
    set_aside(cfg)  # now that the run can begin
    runner.train()


def use_amp(cfg: Config) -> None:
    """Switches the config's optimizer wrapper to mixed precision, as mmdet does.

    Args:
        cfg: Changed in place.

    Raises:
        ConfigError: There is no GPU.
    """
    from mmdet_gdino_lora.engine.unfit import need_gpu

    need_gpu('--amp')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.loss_scale = 'dynamic'

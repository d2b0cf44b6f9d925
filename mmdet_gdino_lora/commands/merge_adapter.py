"""Folds an adapter into its base: a plain checkpoint that mmdet's own detector loads.

merge_adapter.py CONFIG ADAPTER OUT.pth [--scale 0.5]
merge_adapter.py CONFIG ADAPTER FOLDER --format transformers
merge_adapter.py CONFIG ADAPTER OUT.pth --format official
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Optional

from mmdet_gdino_lora.commands.common import (
    add_cfg_options,
    add_overwrite,
    load_source,
    read_arguments,
    read_config,
    read_source,
    refuse_overwriting,
)
from mmdet_gdino_lora.errors import ConfigError


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    arguments = argparse.ArgumentParser(description='Fold an adapter into its base')
    arguments.add_argument('config', help='config file that the adapter was trained with')
    arguments.add_argument('adapter', help='checkpoint of a training run, or adapter folder')
    arguments.add_argument('out', help='.pth or .safetensors file to write, or the folder')
    arguments.add_argument(
        '--scale',
        type=float,
        default=1.0,
        help='strength of the tuning, between 0 (the base) and 1 (fully tuned, the default)',
    )
    arguments.add_argument(
        '--format',
        choices=['mmdet', 'transformers', 'official'],
        default='mmdet',
        help="transformers writes a folder for transformers' from_pretrained; official a .pth for "
        "IDEA-Research's code, and its config beside it",
    )
    add_cfg_options(arguments)
    add_overwrite(arguments)
    args = read_arguments(arguments, argv)

    from mmdet_gdino_lora.lora.store.folder import write_weights
    from mmdet_gdino_lora.lora.store.merge import merged_weights

    written = files_to_write(args.out, args.format)
    if not 0 <= args.scale <= 1:
        raise ConfigError(f'--scale {args.scale:g}: give a number between 0 and 1')
    refuse_overwriting('out', written, args.overwrite)
    detector, meta = load_tuned(args.config, args.adapter, args.cfg_options)
    weights = merged_weights(detector, args.scale)
    if args.format == 'transformers':
        from mmdet_gdino_lora.lora.store.transformers_format import write_transformers

        kind = write_transformers(args.out, detector, weights)
    elif args.format == 'official':
        from mmdet_gdino_lora.lora.store.official_format import write_official

        kind = f'{write_official(args.out, detector, weights)}, its config {written[1]}'
    else:
        write_weights(args.out, weights, dict(dataset_meta=meta.get('dataset_meta', {})))
        kind = f'{len(weights)} tensors'
    print(f'{args.out}: {kind}, adapter at scale {args.scale:g}')


def files_to_write(out: str, form: str) -> list[str]:
    """Names the files that a merge writes.

    Args:
        out: As it was typed: a file, or for transformers a folder.
        form: ``--format``.

    Returns:
        Their paths.

    Raises:
        ConfigError: The name does not fit the format.
    """
    if form == 'mmdet' and not out.endswith(('.pth', '.safetensors')):
        raise ConfigError(f'out {out!r}: name it .pth or .safetensors')
    if form == 'official' and not out.endswith('.pth'):
        raise ConfigError(f'out {out!r}: name it .pth')
    if form == 'transformers' and os.path.isfile(out):
        raise ConfigError(f'out {out!r} is a file; name a folder')
    if form == 'transformers':
        return [os.path.join(out, name) for name in ('config.json', 'model.safetensors')]
    if form == 'official':
        from mmdet_gdino_lora.lora.store.official_format import config_path

        return [out, config_path(out)]
    return [out]


def load_tuned(config: str, adapter: str, options: dict | None = None) -> tuple:
    """Builds the detector of a config and loads a run's checkpoint, on the CPU.

    Args:
        config: Config file.
        adapter: Checkpoint file, or folder of an adapter.
        options: ``--cfg-options``.

    Returns:
        The detector in eval mode, and the checkpoint's ``meta``.

    Raises:
        ConfigError: A file is missing or damaged, or the two don't belong together.
    """
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules

    cfg = read_config(config, options)

    if cfg.model.type != 'LoRAGroundingDINO' or not cfg.model.get('lora'):
        raise ConfigError(f'{config}: model is no LoRAGroundingDINO with lora=; nothing to merge')
    if cfg.get('load_from'):
        cfg.model.setdefault('base_checkpoint', cfg.load_from)
    if not os.path.exists(adapter):
        raise ConfigError(f'adapter {adapter!r}: no such file or folder')
    content = read_source(adapter, adapter_wanted=True)
    register_all_modules()
    detector = MODELS.build(cfg.model)
    meta = load_source(detector, adapter, content)
    return detector.eval(), meta

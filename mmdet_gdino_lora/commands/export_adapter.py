"""Writes a run's adapter in PEFT's own format, with a model card.

export_adapter.py CONFIG CHECKPOINT FOLDER
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
    refuse_overwriting,
)
from mmdet_gdino_lora.commands.merge_adapter import load_tuned
from mmdet_gdino_lora.errors import ConfigError


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    arguments = argparse.ArgumentParser(description="Write an adapter in PEFT's format")
    arguments.add_argument('config', help='config file that the adapter was trained with')
    arguments.add_argument('checkpoint', help='checkpoint of a training run')
    arguments.add_argument('folder', help='folder to write')
    add_cfg_options(arguments)
    add_overwrite(arguments)
    args = read_arguments(arguments, argv)

    from mmdet_gdino_lora.lora.store.folder import FILES, export_adapter

    if os.path.isfile(args.folder):
        raise ConfigError(f'folder {args.folder!r} is a file; name a folder')
    written = [os.path.join(args.folder, name) for name in FILES]
    refuse_overwriting('folder', written, args.overwrite)
    detector, meta = load_tuned(args.config, args.checkpoint, args.cfg_options)
    classes = meta.get('dataset_meta', {}).get('classes', ())
    export_adapter(detector, args.folder, classes=classes)
    print(f'{args.folder}: adapter_config.json, adapter_model.safetensors, README.md')

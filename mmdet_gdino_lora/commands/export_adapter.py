"""Writes a run's adapter in PEFT's own format, with a model card.

export_adapter.py CONFIG CHECKPOINT FOLDER
export_adapter.py CONFIG CHECKPOINT FOLDER --push-to-hub owner/name --private
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
    arguments.add_argument(
        '--push-to-hub', metavar='OWNER/NAME', help='send it to the Hugging Face hub, too'
    )
    arguments.add_argument(
        '--private', action='store_true', help='a repository that is made is for you alone'
    )
    add_cfg_options(arguments)
    add_overwrite(arguments)
    args = read_arguments(arguments, argv)

    from mmdet_gdino_lora.lora.store.folder import FILES, export_adapter

    if os.path.isfile(args.folder):
        raise ConfigError(f'folder {args.folder!r} is a file; name a folder')
    if args.private and not args.push_to_hub:
        raise ConfigError('--private says how --push-to-hub OWNER/NAME makes a repository; add it')
    if args.push_to_hub:
        from mmdet_gdino_lora.lora.store.hub import check_hub, push_folder

        check_hub(args.push_to_hub)
    written = [os.path.join(args.folder, name) for name in FILES]
    refuse_overwriting('folder', written, args.overwrite)
    detector, meta = load_tuned(args.config, args.checkpoint, args.cfg_options)
    classes = meta.get('dataset_meta', {}).get('classes', ())
    export_adapter(detector, args.folder, classes=classes)
    print(f'{args.folder}: adapter_config.json, adapter_model.safetensors, README.md')
    if args.push_to_hub:
        print(push_folder(args.folder, args.push_to_hub, FILES, private=args.private))

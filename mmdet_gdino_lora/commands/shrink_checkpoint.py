"""Writes the weights of a checkpoint in half precision as safetensors: a base to hand on.

shrink_checkpoint.py CHECKPOINT OUT.safetensors
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Optional

from mmdet_gdino_lora.commands.common import add_overwrite, read_arguments, refuse_overwriting
from mmdet_gdino_lora.errors import ConfigError


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    arguments = argparse.ArgumentParser(description="A checkpoint's weights in half precision")
    arguments.add_argument('checkpoint', help="mmengine's checkpoint of a whole model")
    arguments.add_argument('out', help='.safetensors file to write')
    add_overwrite(arguments)
    args = read_arguments(arguments, argv)

    from mmdet_gdino_lora.lora.store.base import read_weights
    from mmdet_gdino_lora.lora.store.folder import write_weights

    if not args.out.endswith('.safetensors'):
        raise ConfigError(f'out {args.out!r}: name it .safetensors')
    if not os.path.isfile(args.checkpoint):
        raise ConfigError(f'checkpoint {args.checkpoint!r}: no such file')
    refuse_overwriting('out', [args.out], args.overwrite)
    weights = read_weights(args.checkpoint)
    halves = {k: w.half() if w.is_floating_point() else w for k, w in weights.items()}
    write_weights(args.out, halves)
    print(f'{args.out}: {len(halves)} tensors, {os.path.getsize(args.out) / 1e6:.2f} MB')

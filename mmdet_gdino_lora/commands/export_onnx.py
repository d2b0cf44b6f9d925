"""Writes a tuned detector as an ONNX file, and compares the two.

export_onnx.py CONFIG ADAPTER OUT.onnx                    the class names it was tuned on, fixed
export_onnx.py CONFIG ADAPTER OUT.onnx --names "cat . dog"
export_onnx.py CONFIG ADAPTER OUT.onnx --text             names are an input
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, Optional

from mmdet_gdino_lora.commands.common import (
    add_cfg_options,
    add_overwrite,
    read_arguments,
    read_config,
    refuse_overwriting,
)
from mmdet_gdino_lora.commands.merge_adapter import load_tuned
from mmdet_gdino_lora.errors import ConfigError


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    args = read_arguments(described(), argv)

    from mmdet_gdino_lora.export.graph import FixedNames, TextInput
    from mmdet_gdino_lora.export.onnx_file import (
        describe,
        differences,
        example,
        package,
        write_onnx,
    )
    from mmdet_gdino_lora.export.plain import plain_detector
    from mmdet_gdino_lora.lora.store.merge import merged_weights
    from mmdet_gdino_lora.text.caption import split_names

    if not args.out.endswith('.onnx'):
        raise ConfigError(f'out {args.out!r}: name it .onnx')
    if not 0 <= args.scale <= 1:
        raise ConfigError(f'--scale {args.scale:g}: give a number between 0 and 1')
    for name in ('onnx', 'onnxruntime'):
        package(name)
    refuse_overwriting('out', [args.out], args.overwrite)
    tuned, meta = load_tuned(args.config, args.adapter, args.cfg_options)
    cfg = read_config(args.config, args.cfg_options)
    names = split_names(args.names) if args.names else class_names(cfg, meta)
    if not names and not args.text:
        raise ConfigError(
            f'neither {args.config} nor {args.adapter} says class names; give them with --names.'
        )
    detector = plain_detector(cfg.model, merged_weights(tuned, args.scale))
    graph = TextInput(detector) if args.text else FixedNames(detector, names)
    pipeline = (cfg.get('test_dataloader') or {}).get('dataset', {}).get('pipeline', ())
    about = describe(detector, names, pipeline, args.score_thr, args.text)
    write_onnx(args.out, graph, about)
    found = differences(args.out, graph, example(graph))
    print(f'{args.out}: inputs {", ".join(graph.inputs)}; outputs {", ".join(graph.outputs)}')
    print(
        'largest difference between onnxruntime and PyTorch, on noise: '
        + ', '.join(f'{name} {value:.2g}' for name, value in found.items())
    )


def described() -> argparse.ArgumentParser:
    """The arguments of the command."""
    arguments = argparse.ArgumentParser(description='Write a tuned detector as an ONNX file')
    arguments.add_argument('config', help='config file that the adapter was trained with')
    arguments.add_argument('adapter', help='checkpoint of a training run, or adapter folder')
    arguments.add_argument('out', help='.onnx file to write')
    arguments.add_argument(
        '--names', help='class names to fix, with " . " between them; default: those of the data'
    )
    arguments.add_argument(
        '--text', action='store_true', help='let the names be an input, and put the text tower in'
    )
    arguments.add_argument(
        '--scale', type=float, default=1.0, help='strength of the tuning, between 0 and 1'
    )
    arguments.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='below which the runner shows nothing (default 0.3); the graph returns all',
    )
    add_cfg_options(arguments)
    add_overwrite(arguments)
    return arguments


def class_names(cfg: Any, meta: dict) -> list[str]:
    """Finds the class names that a detector was tuned on.

    Args:
        cfg: The config.
        meta: Of the checkpoint.

    Returns:
        The names of the checkpoint's data set; of the config's test data where it has none.
    """
    known = meta.get('dataset_meta', {}).get('classes')
    if known is None:
        dataset = (cfg.get('test_dataloader') or {}).get('dataset', {})
        known = dataset.get('metainfo', {}).get('classes', ())
    return list(known)

"""Operations and waits of a training step by part and line, counted without a GPU.

python -m tests.virtual_device --preset decoder --amp bfloat16 --retain

With --traffic, bytes that the step reads and writes at real size, see
tests/virtual_device/real_size.py: all operations but products, convolutions, attention and
sampling; and floating point operations of those products.

python -m tests.virtual_device --traffic --preset all --amp bfloat16
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from mmdet.utils import register_all_modules
from mmengine.logging import MMLogger

import mmdet_gdino_lora  # noqa: F401
from tests.builders import build, tiny_text_model, write_base
from tests.virtual_device.counts import Counts
from tests.virtual_device.real_size import counted_at_real_size
from tests.virtual_device.steps import AMP, Step, counted, full_depth


def rows(title: str, counts: Counter[tuple], most: int) -> None:
    """Prints the largest counts."""
    print(f'\n{title}')
    for key, count in counts.most_common(most):
        print(f'{count:7}  ' + '  '.join(str(part) for part in key))


def show(step: Step, by: list[str], most: int, part: str) -> None:
    """Prints a step's counts."""
    ways: dict[str, Counts] = vars(step)
    names = ('forward', 'backward', 'optimizer')
    totals = {name: ways[name].launches for name in names}
    shown = ', '.join(f'{name} {count}' for name, count in totals.items())
    print(f'operations: {sum(totals.values())} ({shown})')
    for name in names:
        for wait in ways[name].waits:
            print(f'wait in {name}: {wait.kind}: {wait.stack}')
    for name in names:
        rows(f'{name} by part', ways[name].by('part'), most)
    for name in names:
        counts = ways[name].by('part', *by)
        chosen = Counter({key: n for key, n in counts.items() if part in key[0]})
        rows(f'{name} by {", ".join(by)}', chosen, most)


def show_traffic(step: Step, kept: int, by: list[str], most: int, part: str) -> None:
    """Prints what a step moves."""
    ways: dict[str, Counts] = vars(step)
    names = ('forward', 'backward', 'optimizer')
    total = sum(ways[name].traffic for name in names)
    print(f'elementwise traffic {total / 1e9:.1f} GB; kept for backward {kept / 1e9:.1f} GB')
    for name in names:
        counts = ways[name]
        print(
            f'{name}: {counts.traffic / 1e9:.1f} GB, {counts.flops.total() / 1e12:.2f} TFLOP, '
            f'{counts.launches} operations'
        )
    for name in names:
        for fields in (['part'], ['part', *by]):
            print(f'\n{name} by {", ".join(fields)}, GB and operations')
            launches = ways[name].by(*fields)
            sizes = ways[name].by(*fields, of='bytes').most_common()
            for key, size in [row for row in sizes if part in row[0][0]][:most]:
                shown = '  '.join(str(field) for field in key)
                print(f'{size / 1e9:7.2f} {launches[key]:5}  {shown}')


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--preset', default='decoder', help='with --traffic also: full')
    parser.add_argument('--amp', default='', choices=AMP)
    parser.add_argument('--retain', action='store_true', help='with a lesson in the step')
    parser.add_argument('--base-dtype', default='float32')
    parser.add_argument('--queries', type=int, default=100, help='they change no count')
    parser.add_argument('--size', type=int, default=256, help='of the images, in pixels')
    parser.add_argument('--padded', action='store_true', help='images of different sizes')
    parser.add_argument('--by', default='own,name', help='of line, own, name; joined by commas')
    parser.add_argument('--part', default='', help='the lines of this part alone')
    parser.add_argument('--most', type=int, default=40, help='lines of each table')
    parser.add_argument('--traffic', action='store_true', help='bytes at real size, for --preset')
    args = parser.parse_args()
    register_all_modules(init_default_scope=True)
    MMLogger.get_instance('virtual device', log_level='ERROR')
    torch.manual_seed(0)
    by = args.by.split(',')
    if args.traffic:
        with tempfile.TemporaryDirectory() as folder:
            found = counted_at_real_size(folder, args.preset, args.amp, args.retain)
        show_traffic(*found, by, args.most, args.part)
        return
    deep = full_depth(args.queries)
    settings = dict(deep, lora=dict(preset=args.preset, r=4), base_dtype=args.base_dtype)
    if args.retain:
        settings['retain'] = dict(names=[f'old {letter}' for letter in 'abcdefghij'])
    with tempfile.TemporaryDirectory() as folder:
        text_dir = tiny_text_model(folder)
        base = write_base(build(text_dir, lora=None, **deep), str(Path(folder, 'base.pth')))
        begin = time.perf_counter()
        steps = counted(text_dir, base, (args.amp,), size=args.size, padded=args.padded, **settings)
        print(f'{time.perf_counter() - begin:.0f} s')
    show(steps[args.amp], by, args.most, args.part)


if __name__ == '__main__':
    main()

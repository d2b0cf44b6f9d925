"""Milliseconds to switch a detector's adapters off and on again, as `retain` does in every lesson.

    python tools/benchmarks/switch.py [--preset all] [--rounds 200]

MM Grounding DINO with Swin-T, 6 + 6 layers and BERT-base, random weights, on the CPU. Weights that
are trained whole (the box branches) are exchanged with the base's, layers of adapters are told.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import contenders as cs
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import nn

from mmdet_gdino_lora.lora import base_only
from mmdet_gdino_lora.peft_layers.layers import every_adapter_layer


def measure(detector: nn.Module, rounds: int) -> tuple[float, float]:
    """Median milliseconds of one off and on: by the clock, and the process's own."""
    spent = []
    for _ in range(rounds + 1):
        begin = time.perf_counter(), time.process_time()
        with base_only(detector):
            pass
        spent.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    clock, own = (statistics.median(times) * 1e3 for times in zip(*spent[1:]))  # the first looks
    return clock, own


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--preset', default='all')
    parser.add_argument('--rounds', type=int, default=200)
    args = parser.parse_args()
    init_default_scope('mmdet')
    MMLogger.get_instance('switch', log_level='ERROR')
    warnings.filterwarnings('ignore')
    with tempfile.TemporaryDirectory() as folder:
        cs.text_model(folder)
        scale = cs.Scale()
        like = cs.ours(folder, scale, args.preset)
        detector = cs.ours_retaining(folder, scale, args.preset, like).model
        clock, own = measure(detector, args.rounds)
    layers = sum(1 for _ in every_adapter_layer(detector))
    print(f'{args.preset}: off and on {clock:.2f} ms, {own:.2f} of them its own; {layers} layers')


if __name__ == '__main__':
    main()

"""Time per image where names decide who answers (test_cfg.route), beside one answer for all.

    python tools/benchmarks/route.py [--rounds 5] [--image 320 320]

Swin-T of random weights, 6 + 6 layers, 900 queries, COCO's 80 names, half of them taught; image and
names are the same for both, which take turns, and the median of the rounds counts. The last column
says whether the base's names got from the route what the base answers for them, in every bit.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import contenders as cs
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import mmdet_gdino_lora  # noqa: F401
from mmdet_gdino_lora.lora import base_only, lora_state
from mmdet_gdino_lora.route import Route

HEAD = ('preset', 'image', 'one answer, s', 'routed, s', 'ratio', "the base's, bit for bit")


def detect(detector: nn.Module, image: Tensor, names: Sequence[str]) -> DetDataSample:
    """One image through the detector."""
    size = tuple(image.shape[-2:])
    sample = DetDataSample(
        metainfo=dict(
            text=tuple(names),
            custom_entities=True,
            img_shape=size,
            ori_shape=size,
            batch_input_shape=size,
            scale_factor=(1.0, 1.0),
        )
    )
    with torch.no_grad():
        return detector.predict(image, [copy.deepcopy(sample)])[0].pred_instances


def equals_base(detector: nn.Module, image: Tensor, names: Sequence[str], old: set[str]) -> bool:
    """Whether the route's answer for old names is the base's alone."""
    routed = detect(detector, image, names)
    of_base = torch.tensor([name in old for name in routed.label_names])
    with base_only(detector):
        alone = detect(detector, image, [name for name in names if name in old])
    found = routed[of_base]
    order = alone.scores.argsort(descending=True, stable=True)
    return torch.equal(found.scores, alone.scores[order]) and torch.equal(
        found.bboxes, alone.bboxes[order]
    )


def measure(folder: str, preset: str, size: tuple[int, int], rounds: int) -> list[str]:
    """One row of the table."""
    scale = cs.Scale()
    base = os.path.join(folder, 'base.pth')
    if not os.path.exists(base):
        plain = cs.ours(folder, scale, None).model
        torch.save(dict(state_dict=plain.state_dict()), base)
    detector = cs.ours(folder, scale, preset, base_checkpoint=base).model.eval()
    torch.manual_seed(0)
    with torch.no_grad():  # the adapters change something
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    names = scale.names()
    lora_state(detector).shown(names[::2])
    image = torch.randn(1, 3, *size)
    route = Route()
    spent: dict[bool, list[float]] = {False: [], True: []}
    for number in range(rounds + 1):
        for routed, seconds in spent.items():
            detector.route = route if routed else None
            begin = time.perf_counter()
            detect(detector, image, names)
            if number:  # the first warms up
                seconds.append(time.perf_counter() - begin)
        print(f'{preset}: round {number} of {rounds}', file=sys.stderr)
    one, several = (statistics.median(spent[routed]) for routed in (False, True))
    same = equals_base(detector, image, names, set(names[1::2]))
    times = [f'{one:.2f}', f'{several:.2f}', f'{several / one:.2f}']
    return [f'`{preset}`', ' x '.join(map(str, size)), *times, 'yes' if same else 'no']


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--rounds', type=int, default=5)
    parser.add_argument('--image', type=int, nargs=2, default=(800, 1333))
    args = parser.parse_args()
    init_default_scope('mmdet')
    MMLogger.get_instance('route', log_level='ERROR')
    warnings.filterwarnings('ignore')
    print('| ' + ' | '.join(HEAD) + ' |\n' + '| --- | --- ' + '| --: ' * (len(HEAD) - 2) + '|')
    with tempfile.TemporaryDirectory() as folder:
        cs.text_model(folder)
        for preset in ('decoder', 'all'):
            row = measure(folder, preset, tuple(args.image), args.rounds)
            print('| ' + ' | '.join(row) + ' |', flush=True)


if __name__ == '__main__':
    main()

"""Time per image of an exported ONNX file in onnxruntime, beside the same detector in PyTorch.

    python tools/benchmarks/exported.py [--threads 2] [--rounds 5]
    python tools/benchmarks/exported.py --quick

Two detectors with fixed class names: the demo's (assets/) at the size of its images, and a Swin-T
of random weights with 6 + 6 layers, 900 queries and COCO's 80 names on 800 x 1333 pixels
(``--quick``: 320 x 320, in 3 rounds). PyTorch runs the detector itself (``predict``, whose text is
remembered), not the graph. Both get the pixels of one image and as many threads, on the CPU, and
take turns; the median of the rounds counts. The last column is how far a box of onnxruntime's lies
at most from the nearest that PyTorch finds of its class, running the graph: scores of random
weights are so near one another that their order may differ.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import contenders as cs
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import mmdet_gdino_lora  # noqa: F401
from mmdet_gdino_lora.export.graph import FixedNames
from mmdet_gdino_lora.export.onnx_file import package, write_onnx
from mmdet_gdino_lora.export.plain import plain_detector
from mmdet_gdino_lora.lora.store.base import read_weights
from mmdet_gdino_lora.transformer import LeanGroundingDINO

ROOT = Path(__file__).resolve().parents[2]
HEAD = ('detector', 'image', 'PyTorch, s', 'onnxruntime, s', 'ratio', 'file, MB', 'boxes, px')


class Case(NamedTuple):
    """A detector and what it is shown."""

    name: str
    detector: LeanGroundingDINO
    classes: Sequence[str]
    image: tuple[int, int]


def demo() -> Case:
    """The demo's base and its new classes."""
    os.chdir(ROOT)  # its config names files of assets/
    cfg = Config.fromfile('configs/gdino_lora_shapes.py')
    weights = read_weights(cfg.model.base_checkpoint)
    return Case('demo', plain_detector(cfg.model, weights), cfg.metainfo.classes, (128, 128))


def swin_tiny(folder: str, image: tuple[int, int]) -> Case:
    """MM Grounding DINO's Swin-T, of random weights."""
    scale = cs.Scale()
    detector = cs.ours(cs.text_model(folder), scale, None).model.eval()
    # Random features are so alike or unlike that scores would be 0 and 1, without an order.
    nn.init.constant_(detector.decoder.norm.weight, 0.1)
    return Case('Swin-T, 6 + 6 layers', detector, scale.names(), image)


def picture(size: tuple[int, int]) -> Tensor:
    """An image of clouds and noise: in noise alone all places are alike, and many scores tie."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 10, 16, generator=generator)
    clouds = nn.functional.interpolate(coarse, size, mode='bicubic').clamp(0, 1)
    return (200 * clouds + 55 * torch.rand(1, 3, *size, generator=generator)).round()


def in_pytorch(case: Case, pixels: Tensor) -> Callable[[], object]:
    """One image through the detector."""
    height, width = case.image
    sample = DetDataSample(
        metainfo=dict(
            text=tuple(case.classes),
            custom_entities=True,
            img_shape=case.image,
            ori_shape=case.image,
            batch_input_shape=case.image,
            pad_shape=case.image,
            scale_factor=(1.0, 1.0),
        )
    )

    def detect() -> object:
        data = dict(inputs=[pixels], data_samples=[copy.deepcopy(sample)])
        data = case.detector.data_preprocessor(data)
        with torch.no_grad():
            return case.detector.predict(data['inputs'], data['data_samples'])

    return detect


def in_onnxruntime(path: str, images: Tensor, threads: int) -> Callable[[], list[np.ndarray]]:
    """One image through the file."""
    runtime = package('onnxruntime')
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    session = runtime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda: session.run(['boxes', 'labels'], {'images': images.numpy()})


def farthest(found: Sequence[np.ndarray], graph: FixedNames, images: Tensor) -> float:
    """Pixels from a box to the nearest of its class that PyTorch finds, at most."""
    boxes, labels = map(torch.from_numpy, found)
    with torch.no_grad():
        wanted, _, classes = graph(images)
    apart = (boxes[0, :, None] - wanted[0]).abs().amax(-1)
    apart[labels[0, :, None] != classes[0]] = torch.inf
    return float(apart.amin(1).max())


def measure(case: Case, folder: str, threads: int, rounds: int) -> list[str]:
    """One row of the table."""
    path = os.path.join(folder, 'detector.onnx')
    graph = FixedNames(copy.deepcopy(case.detector), case.classes)
    write_onnx(path, graph, {})
    pixels = picture(case.image)
    detect = in_onnxruntime(path, pixels, threads)
    apart = farthest(detect(), graph, pixels)
    del graph
    contenders = [in_pytorch(case, pixels[0].to(torch.uint8)), detect]
    spent: list[list[float]] = [[], []]
    for number in range(rounds + 1):
        for detect, seconds in zip(contenders, spent):
            begin = time.perf_counter()
            detect()
            if number:  # the first warms up
                seconds.append(time.perf_counter() - begin)
        print(f'{case.name}: round {number} of {rounds}', file=sys.stderr)
    ours, theirs = map(statistics.median, spent)
    cells = [f'{ours:.3f}', f'{theirs:.3f}', f'{theirs / ours:.2f}']
    size = f'{os.path.getsize(path) / 1e6:.0f}'
    return [case.name, ' x '.join(map(str, case.image)), *cells, size, f'{apart:.1g}']


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--rounds', type=int, default=0, help='default 5; 3 with --quick')
    parser.add_argument('--quick', action='store_true', help='a small image for the Swin-T')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    init_default_scope('mmdet')
    MMLogger.get_instance('exported', log_level='ERROR')
    warnings.filterwarnings('ignore')
    rounds = args.rounds or (3 if args.quick else 5)
    image = (320, 320) if args.quick else (800, 1333)
    print('| ' + ' | '.join(HEAD) + ' |\n' + '| --- | --- ' + '| --: ' * (len(HEAD) - 2) + '|')
    with tempfile.TemporaryDirectory() as folder:
        for make in (demo, lambda: swin_tiny(folder, image)):
            row = measure(make(), folder, args.threads, rounds)
            print('| ' + ' | '.join(row) + ' |', flush=True)


if __name__ == '__main__':
    main()

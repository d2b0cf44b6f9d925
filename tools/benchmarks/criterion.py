"""Time and memory of the objective, against mmdet's head loss and transformers' loss.

    python tools/benchmarks/criterion.py [--device cpu|cuda] [--quick] [--cpu-time] [--plot FILE]

Forward and backward of all losses of one step: decoder layers and encoder, no denoising queries
(transformers' loss has none). All three get the same random predictions and targets and compute
the same objective (token targets for the encoder). Each gets them as its own model hands them
over: the decoder's layers in one tensor (ours in a list, too), mmdet's and transformers' logits
are padded to 256 tokens, ours are as wide as the caption; a row shows ours with padding, too. The
contenders take turns in one process, and the median counts.

Extra peak memory is what is allocated on top of the inputs, their gradients included: on CUDA
from the allocator's statistics, on the CPU summed up from the profiler's record of every
allocation that torch makes. Host syncs are counted on CUDA, from the profiler.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from mmdet.models.dense_heads import DETRHead
from mmdet.registry import MODELS
from mmengine.logging import MMLogger
from mmengine.structures import InstanceData
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

# the checkout that a tool lies in is the one it measures
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mmdet_gdino_lora.objective.boxes import cxcywh_to_xyxy
from mmdet_gdino_lora.objective.criterion import GroundingDINOCriterion

PADDED = 256
IMAGE = (800, 1333)


@dataclass
class Case:
    """Sizes of one measurement."""

    boxes: Sequence[int] = (20, 5, 33, 12)
    tokens: int = 195
    layers: int = 6
    queries: int = 900

    def inputs(self, device: str) -> tuple[Tensor, Tensor, Tensor, list[dict]]:
        """Logits [L + 1, B, Q, T] and boxes [L + 1, B, Q, 4], the encoder's last; mask; targets."""
        torch.manual_seed(0)
        batch = len(self.boxes)
        shape = (self.layers + 1, batch, self.queries)
        logits = torch.randn(*shape, self.tokens) * 1.5 - 4
        boxes = torch.rand(*shape, 4) * 0.4 + 0.05
        mask = torch.ones(batch, self.tokens, dtype=torch.bool)
        targets = []
        for count in self.boxes:
            labels = torch.randint(0, max(1, self.tokens // 3), (count,))
            spans = torch.zeros(count, self.tokens)
            for offset in range(2):
                spans[torch.arange(count), (labels * 3 + 1 + offset).clamp(max=self.tokens - 1)] = 1
            targets.append(
                dict(labels=labels, boxes=torch.rand(count, 4) * 0.4 + 0.05, token_labels=spans)
            )
        targets = [{key: value.to(device) for key, value in t.items()} for t in targets]
        return logits.to(device), boxes.to(device), mask.to(device), targets


def padded(tokens: Tensor, value: float) -> Tensor:
    return torch.nn.functional.pad(tokens, (0, PADDED - tokens.shape[-1]), value=value)


def ours(
    case: Case, device: str, pad: bool = False, listed: bool = False, **options
) -> Callable[[], Tensor]:
    """Our criterion; a function that does forward and backward and returns the loss.

    The decoder's layers come in one tensor, as from our head (and to mmdet's loss), or listed.
    """
    logits, boxes, mask, targets = case.inputs(device)
    if pad:
        logits = padded(logits, -torch.inf)
    criterion = GroundingDINOCriterion(80, case.layers, **{'enc_target': 'tokens', **options})

    def layer(at: int | slice) -> dict[str, Tensor]:
        parts = dict(pred_logits=logits[at], pred_boxes=boxes[at])
        return {name: part.clone().requires_grad_() for name, part in parts.items()}

    encoder = layer(-1)
    if listed:
        layers = [layer(i) for i in range(case.layers)]
        outputs = dict(layers[-1], aux_outputs=layers[:-1])
    else:
        layers = [layer(slice(case.layers))]
        outputs = dict(decoder_outputs=layers[0])
    outputs.update(enc_outputs=encoder, text_token_mask=mask)

    def step() -> Tensor:
        losses = criterion(outputs, targets)
        loss = sum(criterion.weight_dict[name] * value for name, value in losses.items())
        loss.backward()
        for part in (*layers, encoder):
            part['pred_logits'].grad = part['pred_boxes'].grad = None
        return loss.detach()

    return step


def mmdet(case: Case, device: str, class_cost: str = 'BinaryFocalLossCost') -> Callable[[], Tensor]:
    """mmdet 3.3.0's GroundingDINOHead, from its loss inputs on."""
    logits, boxes, mask, targets = case.inputs(device)
    head = MODELS.build(
        dict(
            type='GroundingDINOHead',
            num_classes=80,
            sync_cls_avg_factor=True,
            contrastive_cfg=dict(max_text_len=PADDED),
            loss_cls=dict(type='FocalLoss', gamma=2.0, alpha=0.25, loss_weight=2.0),
            loss_bbox=dict(type='L1Loss', loss_weight=5.0),
            loss_iou=dict(type='GIoULoss', loss_weight=2.0),
            train_cfg=dict(
                assigner=dict(
                    type='HungarianAssigner',
                    match_costs=[
                        dict(type=class_cost, weight=1.0),
                        dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                        dict(type='IoUCost', iou_mode='giou', weight=2.0),
                    ],
                )
            ),
        )
    ).to(device)
    head.text_masks = mask
    scale = torch.tensor([IMAGE[1], IMAGE[0]] * 2, device=device)
    instances = [
        InstanceData(
            labels=target['labels'],
            bboxes=cxcywh_to_xyxy(target['boxes']) * scale,
            positive_maps=padded(target['token_labels'], 0),
            text_token_mask=padded(valid, False).expand(len(target['labels']), -1),
        )
        for target, valid in zip(targets, mask)
    ]
    metas = [dict(img_shape=IMAGE)] * len(targets)
    logits = padded(logits, -torch.inf)
    leaves = [
        part.clone().requires_grad_() for part in (logits[:-1], boxes[:-1], logits[-1], boxes[-1])
    ]

    def step() -> Tensor:
        # what DINOHead.loss_by_feat does when there are no denoising queries
        losses = DETRHead.loss_by_feat(head, *leaves[:2], instances, metas)
        encoder = head.loss_by_feat_single(*leaves[2:], instances, metas)
        loss = sum(losses.values()) + sum(encoder)
        loss.backward()
        for leaf in leaves:
            leaf.grad = None
        return loss.detach()

    return step


def transformers(case: Case, device: str) -> Callable[[], Tensor]:
    """transformers' loss_grounding_dino, with its cost weights set to the paper's."""
    from transformers.loss.loss_grounding_dino import GroundingDinoForObjectDetectionLoss

    logits, boxes, mask, targets = case.inputs(device)
    logits = padded(logits, -torch.inf)
    config = SimpleNamespace(
        class_cost=1.0,
        bbox_cost=5.0,
        giou_cost=2.0,
        focal_alpha=0.25,
        auxiliary_loss=True,
        two_stage=True,
        bbox_loss_coefficient=5.0,
        giou_loss_coefficient=2.0,
        decoder_layers=case.layers,
    )
    # one map of all targets for every image: its offsets are right only for maps of one length
    maps = padded(torch.cat([target['token_labels'] for target in targets]), 0)
    labels, first = [], 0
    for target in targets:
        numbers = torch.arange(first, first + len(target['boxes']), device=device)
        labels.append(dict(class_labels=numbers, boxes=target['boxes']))
        first += len(target['boxes'])
    text_mask = padded(mask, False)[:, None].expand(-1, case.queries, -1)
    leaves = [part.clone().requires_grad_() for part in (*logits, *boxes)]
    all_logits, all_boxes = leaves[: len(logits)], leaves[len(logits) :]

    def step() -> Tensor:
        loss, _, _ = GroundingDinoForObjectDetectionLoss(
            all_logits[-2],
            labels,
            device,
            all_boxes[-2],
            config,
            [maps] * len(targets),
            text_mask,
            outputs_class=all_logits[:-1],
            outputs_coord=all_boxes[:-1],
            encoder_logits=all_logits[-1],
            encoder_pred_boxes=all_boxes[-1],
        )
        loss.backward()
        for leaf in leaves:
            leaf.grad = None
        return loss.detach()

    return step


def alternate(
    steps: dict[str, Callable], device: str, seconds: float, clock: Callable[[], float]
) -> dict[str, float]:
    """Median milliseconds of each step; they take turns for about ``seconds`` in all."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or min(map(len, times.values())) < 3:
        for name, step in steps.items():
            start = clock()
            step()
            if device == 'cuda':
                torch.cuda.synchronize()
            times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def peak_memory(step: Callable, device: str) -> float:
    """MiB allocated at the highest point of one step, on top of what was there before."""
    step()
    gc.collect()
    if device == 'cuda':
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == '[memory]']
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / 2**20


def host_syncs(step: Callable) -> int:
    """How often one step on CUDA makes the host wait."""
    step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as record:
        step()
        torch.cuda.synchronize()
    waits = ('cudaStreamSynchronize', 'cudaDeviceSynchronize', 'cudaEventSynchronize')
    return sum(e.count for e in record.key_averages() if e.key in waits) - 1  # the last is ours


def table(rows: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for number, row in enumerate(rows):
        print('| ' + ' | '.join(cell.rjust(width) for cell, width in zip(row, widths)) + ' |')
        if not number:
            print('|' + '|'.join('-' * (width + 1) + ':' for width in widths) + '|')
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--quick', action='store_true', help='the main size only')
    parser.add_argument('--plot', metavar='FILE', help='draw the sweeps into this file')
    parser.add_argument('--seconds', type=float, default=30.0, help='for the main size')
    parser.add_argument(
        '--cpu-time',
        action='store_true',
        help='time of the processor, not of the clock: for a machine that others use as well, '
        'with OMP_NUM_THREADS=1',
    )
    args = parser.parse_args()
    device = args.device
    clock = time.process_time if args.cpu_time else time.perf_counter
    MMLogger.get_instance('mmengine').setLevel('WARNING')
    print(f'torch {torch.__version__}, {device}, {torch.get_num_threads()} CPU threads')
    print(f'{"processor" if args.cpu_time else "wall"} time, medians\n')

    case = Case()
    steps = {
        'ours': ours(case, device),
        'ours, layers in a list': ours(case, device, listed=True),
        'ours, objectness': ours(case, device, enc_target='objectness'),
        'ours, padded to 256': ours(case, device, pad=True),
        'mmdet head': mmdet(case, device),
        'transformers': transformers(case, device),
    }
    reference = steps['transformers']()
    difference = abs(float(steps['ours']() / reference - 1))
    print(f'loss, ours against transformers: relative difference {difference:.1e}')
    print(
        f'{case.layers} layers + encoder, {len(case.boxes)} images with '
        f'{", ".join(map(str, case.boxes))} boxes, {case.queries} queries, {case.tokens} tokens:\n'
    )
    times = alternate(steps, device, args.seconds, clock)
    memory = {name: peak_memory(step, device) for name, step in steps.items()}
    header = ['', 'ms', 'times ours', 'extra peak MiB', 'of mmdet']
    rows = [header + (['host syncs'] if device == 'cuda' else [])]
    for name, step in steps.items():
        row = [
            name,
            f'{times[name]:.1f}',
            f'{times[name] / times["ours"]:.2f}x',
            f'{memory[name]:.1f}',
            f'{memory[name] / memory["mmdet head"]:.2f}',
        ]
        rows.append(row + ([str(host_syncs(step))] if device == 'cuda' else []))
    table(rows)
    if not args.quick:
        sweeps(device, clock, args.plot)


def sweeps(device: str, clock: Callable[[], float], plot: str | None) -> None:
    """Time as boxes, images and tokens grow."""
    keep_memory()
    curves = {}
    for name, values, make in (
        ('boxes per image', (5, 20, 100, 500), lambda n: Case(boxes=(n,) * 2)),
        ('images', (1, 2, 4, 8, 16), lambda n: Case(boxes=(20,) * n)),
        ('tokens', (8, 32, 64, 128, 256), lambda n: Case(tokens=n)),
    ):
        rows = [[name, 'ours ms', 'mmdet ms', 'transformers ms']]
        for value in values:
            case = make(value)
            steps = dict(
                ours=ours(case, device),
                mmdet=mmdet(case, device),
                transformers=transformers(case, device),
            )
            times = alternate(steps, device, 3, clock)
            rows.append([str(value), *(f'{time:.1f}' for time in times.values())])
            for contender, milliseconds in times.items():
                curves.setdefault((name, contender), []).append((value, milliseconds))
        table(rows)
    if plot:
        draw(curves, plot)


def keep_memory() -> None:
    """Tells glibc not to hand freed memory back to the system.

    What one contender's step frees, the next one's would have to take page by page again, at sizes
    that depend on the heap's layout: steps in the curves that are none of the objective's.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'mallopt'):
        trim_threshold, mmap_max = -1, -4
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_max, 0)


def draw(curves: dict, file: str) -> None:
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for name, _ in curves))
    figure, axes = pyplot.subplots(1, len(names), figsize=(4.5 * len(names), 3.5))
    for axis, name in zip(axes, names):
        for (sweep, contender), points in curves.items():
            if sweep == name:
                axis.plot(*zip(*points), marker='o', label=contender)
        axis.set(xlabel=name, ylabel='ms, forward + backward', xscale='log', yscale='log')
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    print(f'plot written to {file}')


if __name__ == '__main__':
    main()

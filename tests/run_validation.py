"""One rank that validates other batches than the other rank."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tests.builders import WORDS, build, data_samples

MANY = [f'{a} {b}' for a in WORDS for b in WORDS]  # of more tokens than a caption has


def losses(detector: nn.Module, names: list[str], boxes: list[int], truth: bool = True) -> dict:
    """Losses that a validation step has for mmengine's loop; empty without."""
    samples = data_samples(names, boxes)
    if not truth:
        for sample in samples:
            del sample.gt_instances
    images = [torch.full((3, 64, 64), 90.0)] * len(boxes)
    *_, last = detector.val_step(dict(inputs=images, data_samples=samples))
    return last.loss if 'loss' in last else {}


def validate_a_rank(work_dir: str, text_dir: str, base: str) -> None:
    """Validates, and leaves the rank's losses in the work dir."""
    rank = torch.distributed.get_rank()
    detector = build(text_dir, base_checkpoint=base).eval()
    torch.distributed.barrier()
    if rank == 0:
        results = [losses(detector, WORDS[:4], [3, 1]), losses(detector, WORDS[:4], [2])]
    else:
        results = [losses(detector, WORDS[:4], [1], truth=False), losses(detector, MANY, [1])]
    torch.distributed.barrier()
    torch.save(results, Path(work_dir, f'{rank}.pth'))

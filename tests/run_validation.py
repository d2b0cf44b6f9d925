"""One rank that validates other batches than the other rank, for `torch.distributed.run`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
from mmdet.utils import register_all_modules
from torch import nn

import mmdet_gdino_lora  # noqa: F401
from tests.builders import THREADS, WORDS, build, data_samples

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


def main(work_dir: str, text_dir: str, base: str) -> None:
    """Validates, and leaves the rank's losses in the work dir."""
    torch.distributed.init_process_group('gloo', timeout=timedelta(seconds=60))
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(THREADS)
    rank = torch.distributed.get_rank()
    detector = build(text_dir, base_checkpoint=base).eval()
    torch.distributed.barrier()
    if rank == 0:
        results = [losses(detector, WORDS[:4], [3, 1]), losses(detector, WORDS[:4], [2])]
    else:
        results = [losses(detector, WORDS[:4], [1], truth=False), losses(detector, MANY, [1])]
    torch.distributed.barrier()
    torch.save(results, Path(work_dir, f'{rank}.pth'))
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])

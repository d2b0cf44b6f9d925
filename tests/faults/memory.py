"""Resident memory of a long run: 5,000 steps of the smallest model, everything on.

python -m tests.faults.memory [STEPS]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import HOOKS
from mmdet.utils import register_all_modules
from mmengine.hooks import Hook
from mmengine.runner import Runner

from tests.builders import THREADS, build, tiny_text_model, write_base
from tests.faults.smallest import model, smallest

ALLOWED = 0.03


@HOOKS.register_module(force=True)
class MemoryHook(Hook):
    """Notes the resident memory of the process, in MiB, after every hundredth iteration."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        done = runner.iter + 1
        if done % 100 == 0:
            pages = int(Path('/proc/self/statm').read_text().split()[1])
            self.seen[done] = pages * 4096 / 2**20
            if done % 500 == 0:
                print(f'{done:6} steps {self.seen[done]:8.1f} MiB', flush=True)


def grown(steps: int, work_dir: str) -> tuple[float, float]:
    """Trains, and measures.

    Args:
        steps: Number of iterations.
        work_dir: For everything that is written.

    Returns:
        Resident memory after a tenth of the iterations and after all of them, in MiB.
    """
    text_dir = tiny_text_model(f'{work_dir}/text')
    torch.manual_seed(0)
    base = write_base(build(text_dir, lora=None, **model()), f'{work_dir}/base.pth')
    cfg = smallest(
        f'{work_dir}/run',
        text_dir,
        base,
        by_epoch=False,
        scores=[0.5] * (steps // 250 + 1),
        hooks=[
            dict(type='NonFiniteHook'),
            dict(type='PreemptHook'),
            dict(type='EMAHook'),
            dict(type='MemoryHook'),
        ],
        checkpoint=dict(interval=500, max_keep_ckpts=1),
    )
    cfg.train_cfg.update(max_iters=steps, val_interval=250)
    cfg.default_hooks.logger.interval = 50
    cfg.log_level = 'WARNING'
    runner = Runner.from_cfg(cfg)
    runner.train()
    seen = next(hook.seen for hook in runner.hooks if isinstance(hook, MemoryHook))
    return seen[steps // 10], seen[steps]


def main() -> int:
    """Command line."""
    steps = int(sys.argv[1]) if sys.argv[1:2] and sys.argv[1].isdigit() else 5000
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as work_dir:
        early, late = grown(steps, work_dir)
    print(
        f'resident memory after {steps // 10} steps {early:.1f} MiB, after {steps} {late:.1f} MiB: '
        f'{100 * (late / early - 1):+.2f} %, allowed +{100 * ALLOWED:g} %'
    )
    return int(late > early * (1 + ALLOWED))


if __name__ == '__main__':
    sys.exit(main())

"""One rank of a run on several processes: what `torch.distributed.run` starts in the tests.

mmengine's own start of the process group asks for a GPU, so it is started here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from mmdet.utils import register_all_modules
from mmengine.runner.checkpoint import weights_to_cpu

from tests.builders import THREADS
from tests.run_small import run


def main(work_dir: str, text_dir: str, base: str, settings: str) -> None:
    """Trains, and leaves the rank's weights in the work dir."""
    torch.distributed.init_process_group('gloo')
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(THREADS)
    runner = run(
        work_dir,
        text_dir,
        base,
        by_epoch=True,
        batch_size=1,
        launcher='pytorch',
        **json.loads(settings),
    )
    rank = torch.distributed.get_rank()
    torch.save(weights_to_cpu(runner.model.module.state_dict()), Path(work_dir, f'{rank}.pth'))
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])

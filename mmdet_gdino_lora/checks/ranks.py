"""Which of a job's processes this is, also before mmengine has started a process group."""

from __future__ import annotations

import os

from mmengine.dist import get_rank, is_distributed


def rank() -> int:
    """Tells this process's rank.

    Returns:
        The group's number of it; before there is a group, what the launcher left in the
        environment; else 0.
    """
    if is_distributed():
        return get_rank()
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return int(next((os.environ[name] for name in names if name in os.environ), 0))

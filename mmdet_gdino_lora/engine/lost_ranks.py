"""Which ranks of a job are gone? Asked by those that are left when their connection broke."""

from __future__ import annotations

import time

from torch import distributed

SECONDS = 5.0
"""How long a rank waits for the others to say that they are there."""


def lost_ranks() -> list[int]:
    """Finds the ranks that no longer answer.

    Every rank whose connection broke says so in the store that the process group was made with, and
    looks who else has.

    Returns:
        Numbers of ranks that didn't answer; rank 0 where the store, which it usually holds, is gone
        as well.
    """
    rank, count = distributed.get_rank(), distributed.get_world_size()
    end = time.monotonic() + SECONDS
    missing = [other for other in range(count) if other != rank]
    try:
        store = distributed.distributed_c10d._get_default_store()
        store.set(f'left/{rank}', '1')
        while missing and time.monotonic() < end:
            time.sleep(0.1)
            missing = [other for other in missing if not store.check([f'left/{other}'])]
    except (RuntimeError, OSError, ValueError):
        return [0]
    return missing

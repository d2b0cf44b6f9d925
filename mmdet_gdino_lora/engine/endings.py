"""What ends a run from outside, in one sentence: a killed worker, a lost rank, a full disk."""

from __future__ import annotations

import errno
import re
from typing import Optional

from torch import distributed

from mmdet_gdino_lora.engine.lost_ranks import lost_ranks
from mmdet_gdino_lora.errors import ConfigError

RESUME = 'what was saved is whole: the same command with --resume goes on from the last checkpoint'
_WORKER = re.compile(r'DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (.*)', re.S)
_GONE = re.compile(
    r'Connection (?:closed|reset) by (?:remote )?peer|Broken pipe|Socket closed'
    r'|remote process exited|NCCL error|NCCL communicator was aborted|Timed? ?out waiting',
    re.I,
)


def ending(error: BaseException) -> Optional[str]:
    """Tells what ended a run.

    Args:
        error: What training raised.

    Returns:
        A sentence; None where the error is of another kind, and its traceback is worth reading.
    """
    chain: list[BaseException] = []
    current: Optional[BaseException] = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__
    for one in chain:
        sentence = _sentence(one)
        if sentence:
            return sentence
    return None


def _sentence(error: BaseException) -> Optional[str]:
    if any(kind.__name__ == 'ConfigError' for kind in type(error).__mro__):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f' ({error.filename})' if error.filename else ''
        return str(
            ConfigError(
                f'the disk that the run writes to is full{where}: free space there; {RESUME}'
            )
        )
    if not isinstance(error, RuntimeError):
        return None
    worker = _WORKER.search(str(error))
    if worker:
        how = ' '.join(worker.group(2).split()).rstrip('. ')
        told = ConfigError(
            f'a worker of a data loader (process {worker.group(1)}) is gone: it {how}; most often '
            'the system ends one when memory is short: lower num_workers of the loaders or the '
            f'batch size; {RESUME}'
        )
        return str(told)
    if distributed.is_initialized() and _GONE.search(str(error)):
        rank, count = distributed.get_rank(), distributed.get_world_size()
        lost = ' and '.join(f'rank {other}' for other in lost_ranks()) or 'touch with another rank'
        told = ConfigError(
            f'rank {rank} of {count} lost {lost}, which ended or hangs (its own last words '
            f'are above: {" ".join(str(error).split())[:160]}); {RESUME}'
        )
        return str(told)
    return None

"""Processes of their own that need not import for seconds.

They are forked from a server that has imported what they need and done nothing else: a copy of the
test's own process would inherit threads and autograd's state.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing import start_processes

from tests.builders import THREADS

ROOT = Path(__file__).parent.parent
multiprocessing.get_context('forkserver').set_forkserver_preload(
    ['mmdet.utils', 'mmdet_gdino_lora', 'tests.run_small', 'tests.run_validation', 'tests.tool_run']
)


def in_new_processes(work: Callable, *arguments: Any, count: int = 1) -> None:
    """Calls a function in new processes, and waits for them.

    Args:
        work: A function of a module, called with the process's number and the arguments.
        *arguments: What else it is called with.
        count: Number of processes.

    Raises:
        torch.multiprocessing.ProcessException: One of them failed or was killed.
    """
    with importing_from_the_checkout():
        start_processes(_work, (work, arguments), nprocs=count, start_method='forkserver')


@contextmanager
def importing_from_the_checkout() -> Iterator[None]:
    """Lets the server, which starts when it is first needed, import from this checkout."""
    before, path = os.getcwd(), os.environ.get('PYTHONPATH')
    try:
        os.chdir(ROOT)
        os.environ['PYTHONPATH'] = str(ROOT)
        yield
    finally:
        os.chdir(before)
        os.environ.pop('PYTHONPATH')
        if path is not None:
            os.environ['PYTHONPATH'] = path


def as_ranks(work: Callable, *arguments: Any) -> None:
    """Calls a function in two processes that form a group.

    Args:
        work: A function of a module, called with the arguments.
        *arguments: What it is called with.

    Raises:
        torch.multiprocessing.ProcessException: One of them failed.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    in_new_processes(_rank, port, work, arguments, count=2)


def _work(number: int, work: Callable, arguments: tuple) -> None:
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    torch.set_num_threads(THREADS)  # as in the tests: sums depend on it
    work(number, *arguments)


def _rank(rank: int, port: int, work: Callable, arguments: tuple) -> None:
    # mmengine's own start of the process group asks for a GPU.
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE='2')
    torch.distributed.init_process_group(
        'gloo',
        f'tcp://127.0.0.1:{port}',
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    work(*arguments)
    torch.distributed.destroy_process_group()

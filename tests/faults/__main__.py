"""Lets every fault strike a real training process, and tells in a table what came of it.

python -m tests.faults [faults] [moments] [cycles] [memory]; default: all four
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from mmdet.utils import register_all_modules

from mmdet_gdino_lora.files.read import read_file
from tests.builders import THREADS, build, tiny_text_model, write_base
from tests.faults import memory
from tests.faults.injected import NAN_PLACES
from tests.faults.smallest import model
from tests.faults.victim import WORKERS, as_a_tool, train, weights

MOMENTS, CYCLES, PATIENCE = 20, 200, 300
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['tests.faults.victim'])


class Fault(NamedTuple):
    """One that is injected.

    Attributes:
        name: For the table.
        hook: That injects it, before the fifth of ten iterations, the first of the third epoch.
        status: Of the process: negative is the signal that killed it.
        told: Part of what the user sees; empty for a process that can't say anything.
        settings: Of the run.
        resumes: Whether the run can go on, to the weights of the run that nothing struck.
        ranks: Number of processes.
    """

    name: str
    hook: dict
    status: int
    told: str
    settings: dict = {}
    resumes: bool = True
    ranks: int = 1


def _fault(what: str, status: int, told: str, **others: Any) -> Fault:
    hook = dict(type='FaultHook', what=what, at=others.pop('at', 5))
    return Fault(what.replace('_', ' '), hook, status, told, **others)


FAULTS = [
    _fault('in_forward', -signal.SIGKILL, ''),
    _fault('in_backward', -signal.SIGKILL, ''),
    _fault('while_writing_checkpoint', -signal.SIGKILL, ''),
    _fault('while_writing_adapter', -signal.SIGKILL, ''),
    _fault('between_the_two', -signal.SIGKILL, ''),
    _fault('sigterm', 143, 'SIGTERM came: the run was saved after iteration 5', at=4),
    _fault('disk_fills_up', 2, 'the disk that the run writes to is full'),
    _fault('disk_leaves_little', 2, 'could not be written (No space left on device)'),
    _fault('worker_killed', 2, 'a worker of a data loader', settings=dict(loader=WORKERS)),
    _fault('rank_dies', 2, 'rank 0 of 2 lost rank 1', ranks=2, resumes=False),
    _fault('images_go_bad', 0, 'can no longer be read; another image', resumes=False),
    *(
        Fault(f'NaN in {where}', dict(type='NaNHook', where=where, at=[5]), 2, 'NaN or infinite')
        for where in NAN_PLACES
    ),
]


class Bench:
    """A folder with what all runs need, and the run that nothing strikes.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        text_dir = tiny_text_model(f'{root}/text')
        torch.manual_seed(0)
        base = write_base(build(text_dir, lora=None, **model()), f'{root}/base.pth')
        self.settings: dict[str, Any] = dict(text_dir=text_dir, base=base)
        assert self.run('whole', dict(loader=WORKERS)) == 0, self.said('whole')[-3000:]
        self.weights = weights(f'{root}/whole')

    def start(self, name: str, settings: dict, rank: Optional[dict] = None, **others: Any) -> Any:
        """Starts a training process.

        Args:
            name: Of its work dir.
            settings: Beside text model and base.
            rank: As for :func:`as_a_tool`.
            **others: As for :func:`train`.
        """
        log = f'{self.root}/{name}.{(rank or {}).get("RANK", "0")}.log'
        arguments = (log, rank or {}, {**self.settings, **settings}, f'{self.root}/{name}')
        process = SERVER.Process(target=as_a_tool, args=arguments, kwargs=others)
        process.start()
        return process

    def run(self, name: str, settings: dict, ranks: int = 1, **others: Any) -> int:
        """Trains to the end, whatever it is.

        Args:
            name: As for :meth:`start`.
            settings: The same.
            ranks: Number of processes.
            **others: As for :meth:`start`.

        Returns:
            The status of the process, of several of the first.
        """
        environments: list[dict[str, str]] = [{}]
        if ranks > 1:
            with socket.socket() as free:
                free.bind(('127.0.0.1', 0))
                port = str(free.getsockname()[1])
            common = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port, WORLD_SIZE=str(ranks))
            environments = [dict(common, RANK=str(r), LOCAL_RANK=str(r)) for r in range(ranks)]
        processes = [self.start(name, settings, rank, **others) for rank in environments]
        for process in processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        return processes[0].exitcode

    def said(self, name: str) -> str:
        """What a run's processes have said, the first one's."""
        return Path(self.root, f'{name}.0.log').read_text(encoding='utf-8', errors='replace')

    def same(self, name: str) -> bool:
        """Whether a run ended with the weights of the run that nothing struck."""
        others = weights(f'{self.root}/{name}')
        return others.keys() == self.weights.keys() and all(
            torch.equal(others[n], weight) for n, weight in self.weights.items()
        )


def strike(bench: Bench, fault: Fault) -> tuple[bool, list[str]]:
    """Lets a fault strike.

    Args:
        bench: With everything.
        fault: The fault.

    Returns:
        Whether all came as it should, and the table's row.
    """
    name = fault.name.replace(' ', '_')
    folder = bench.root / name
    settings = dict(fault.settings)
    if fault.hook.get('what') == 'images_go_bad':
        settings['images'] = f'{bench.root}/images'
    small_disk = str(fault.hook.get('what')).startswith('disk') and _mount(folder)
    status = bench.run(name, settings, fault.ranks, hooks=(fault.hook,))
    said = bench.said(name)
    told = next((line for line in reversed(said.splitlines()) if fault.told in line), '')
    told = re.sub(r'^.*?(error:|WARNING -)', '', told).strip() if fault.told else '(killed)'
    lost = max(0, _reached(folder) - _kept(folder))
    partial = [str(p) for p in folder.rglob('*.partial')] if status > 0 else []
    well = status == fault.status and bool(told) and not partial
    end = 'went on' if status == 0 else ''
    if fault.resumes:
        if small_disk:
            (folder / 'ballast').unlink()
        went = bench.run(name, fault.settings, resume=True) == 0 and bench.same(name)
        end = 'resumed, same bits' if went else 'NOT resumed to the same bits'
        left = sorted(p.name for p in folder.rglob('*') if _is_left_over(p))
        well = well and went and not left
        end += f', left {left}' if left else ''
    if small_disk:
        subprocess.run(['umount', str(folder)], check=True)
    return well, [fault.name, str(status), told[:200], '' if status == 0 else str(lost), end]


def _mount(folder: Path) -> bool:
    """A disk of 40 MiB for a run; False where mounting is not permitted."""
    folder.mkdir()
    command = ['mount', '-t', 'tmpfs', '-o', 'size=40m', 'tmpfs', str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def _reached(folder: Path, unmarked: int = 5) -> int:
    """The iteration that was begun last; what is said where no run marked it."""
    marker = folder / 'reached'
    return int((marker.is_file() and marker.read_text()) or unmarked)


def _kept(folder: Path) -> int:
    """Iterations that the last checkpoint has seen."""
    named = folder / 'last_checkpoint'
    if not named.is_file():
        return 0
    return read_file(named.read_text())['meta']['iter']


def _is_left_over(path: Path) -> bool:
    return path.name.endswith('.partial') or path.name == 'preempted.pth'


def faults(bench: Bench) -> bool:
    """Lets every fault strike, and prints the table."""
    print('| injected | status | what the user saw | iterations lost | then |', flush=True)
    print('|---|--:|---|--:|---|', flush=True)
    well = True
    for fault in FAULTS:
        as_it_should, row = strike(bench, fault)
        well = well and as_it_should
        mark = '' if as_it_should else ' **NOT AS IT SHOULD BE**'
        print(f'| {" | ".join(row)}{mark} |', flush=True)
    return well


def moments(bench: Bench) -> bool:
    """Kills runs at random moments, and resumes them; with two workers that live on."""
    draw = random.Random(0)
    same = 0
    for number in range(MOMENTS):
        name = f'moment_{number}'
        marked = dict(type='FaultHook', what='nothing', at=-1)
        process = bench.start(name, dict(loader=WORKERS), hooks=(marked,))
        # Anywhere in an iteration, between two, and while the checkpoints after them are written.
        begun, later = draw.randrange(10), draw.uniform(0, 1)
        while process.is_alive() and _reached(bench.root / name, -1) < begun:
            time.sleep(0.01)
        process.join(later)
        process.kill()
        process.join()
        kept, end = _kept(bench.root / name), process.exitcode
        status = bench.run(name, dict(loader=WORKERS), resume=True)
        well = status == 0 and bench.same(name)
        same += well
        print(
            f'moment {number}: status {end} in iteration {begun + 1}, {kept} were kept; '
            f'same bits: {well}',
            flush=True,
        )
        shutil.rmtree(bench.root / name)
    print(f'{same} of {MOMENTS} runs that were killed and resumed ended with the same bits')
    return same == MOMENTS


def cycles(bench: Bench) -> bool:
    """Starts, stops by SIGTERM and resumes again and again, in this process."""
    folder = f'{bench.root}/cycles'
    for cycle in range(CYCLES):
        # Seven iterations forwards, then the run is over and the next one begins it anew.
        stop = dict(type='FaultHook', what='sigterm', at=cycle % 10)
        try:
            train(bench.settings, folder, resume=cycle % 10 > 0, hooks=(stop,))
        except SystemExit as end:
            assert end.code == 143
    files = [p for p in Path(folder).iterdir() if not re.fullmatch(r'\d{8}_\d{6}', p.name)]
    names = sorted(p.name for p in files)
    wanted = [n for e in range(1, 6) for n in (f'epoch_{e}.pth', f'epoch_{e}_adapter')]
    extra = [n for n in names if n not in (*wanted, 'last_checkpoint', 'reached')]
    extra = [n for n in extra if not n.endswith('.py')]
    print(f'{CYCLES} cycles left {names}; files too many: {extra or "none"}')
    return not extra


def main() -> int:
    """Command line."""
    logging.disable(logging.INFO)  # of this process; those that are struck say everything
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(THREADS)
    chosen = sys.argv[1:] or ['faults', 'moments', 'cycles', 'memory']
    well = True
    if set(chosen) - {'memory'}:
        with tempfile.TemporaryDirectory() as root:
            bench = Bench(Path(root))
            for part in (faults, moments, cycles):
                if part.__name__ in chosen:
                    well = part(bench) and well
    if 'memory' in chosen:
        well = memory.main() == 0 and well
    return int(not well)


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    sys.exit(main())

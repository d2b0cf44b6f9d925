"""`make gpu`: what there is to see on a GPU, in one report.

    python tools/gpu_report.py [--parts tests criterion step demo] [--out FOLDER] [--budget 600]

Runs the tests that need a GPU, the benchmarks of the objective and of a training step against
mmdet's and transformers', and the demo, each in a process of its own. The report, ``report.md``, is
written anew after every part; a part that failed or ran out of time is shown with its last lines
and the others go on. Parts that ran before and are not asked for again keep their place in it.
Ends with 0 where all parts of the report passed, 1 where one did not, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

# the checkout that a tool lies in is the one it reports on
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gpu_tables import Record, report

ROOT = Path(__file__).resolve().parents[1]
#: All of step.py's but those that trade time for memory, and the preset in between.
CONTENDERS = '^(?!.*(checkpointing|encoder))'


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of the report.

    Attributes:
        title: Heading in it.
        arguments: Of Python.
        seconds: After which it is stopped.
    """

    title: str
    arguments: tuple[str, ...]
    seconds: float


PARTS = {
    'tests': Part(
        'Tests', ('-m', 'pytest', '-q', '-n', '4', '-W', 'ignore', 'tests/test_cuda.py'), 240
    ),
    'criterion': Part(
        'The objective',
        ('tools/benchmarks/criterion.py', '--device', 'cuda', '--quick', '--seconds', '15'),
        90,
    ),
    'step': Part(
        'A training step',
        ('tools/benchmarks/step.py', '--device', 'cuda', '--only', CONTENDERS),
        240,
    ),
    'demo': Part('The demo', ('tools/demo.py',), 150),
}


def run(part: Part, seconds: float, log: Path) -> Record:
    """Runs a part to its end, or as long as it may.

    Args:
        part: To run.
        seconds: It may take.
        log: File for what it prints.

    Returns:
        What came of it.
    """
    environment = dict(os.environ, HF_HUB_OFFLINE='1', PYTHONUNBUFFERED='1', GPU_TESTS='1')
    begin = time.monotonic()
    with log.open('w') as file:
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a loader's workers end with it
        )
        try:
            end = 'failed' if process.wait(max(seconds, 0)) else 'passed'
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            end = 'stopped'
    return Record(
        title=part.title,
        command=shlex.join(['python', *part.arguments]),
        end=end,
        seconds=time.monotonic() - begin,
        output=log.read_text(errors='replace'),
    )


def no_gpu() -> Optional[str]:
    """Says in one sentence that there is no GPU; None where there is one."""
    import torch

    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    reason = 'finds no card' if built else 'is a build for CPUs'
    return f'error: there is no GPU here: torch {torch.__version__} {reason}'


def about() -> list[str]:
    """Lines on the card, the versions and the commit."""
    import torch
    from mmcv.ops import get_compiling_cuda_version

    from mmdet_gdino_lora.environment import family, installed_version, supported

    card = torch.cuda.get_device_properties(0)
    packages = [p.distribution for name, p in supported(family()).items() if name != 'torch']
    git = subprocess.run(
        ['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True
    )
    return [
        f'{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability '
        f'{card.major}.{card.minor}; {os.cpu_count()} CPU cores',
        f'Python {platform.python_version()}, torch {torch.__version__}, '
        + ', '.join(f'{name} {installed_version(name)}' for name in packages),
        f"mmcv's kernels: CUDA {get_compiling_cuda_version()}",
        f'commit {git.stdout.strip() or "not known"}, {time.strftime("%Y-%m-%d")}',
    ]


def records(folder: Path) -> list[Record]:
    """Reads what came of the parts so far, in the report's order."""
    files = [folder / f'{name}.json' for name in PARTS]
    return [Record(**json.loads(file.read_text())) for file in files if file.exists()]


def write_report(folder: Path, lines: Sequence[str]) -> bool:
    """Writes ``report.md``.

    Args:
        folder: With the parts' records.
        lines: On card and versions.

    Returns:
        Whether all parts in it passed.
    """
    found = records(folder)
    (folder / 'report.md').write_text(report(lines, found))
    return all(record.end == 'passed' for record in found)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/gpu'), help='default: %(default)s'
    )
    parser.add_argument('--budget', type=float, default=600, help='seconds for all parts together')
    args = parser.parse_args(argv)
    absent = no_gpu()
    if absent:
        print(absent, file=sys.stderr)
        sys.exit(2)
    end = time.monotonic() + args.budget
    args.out.mkdir(parents=True, exist_ok=True)
    lines, passed = about(), False
    for name in args.parts:
        part = PARTS[name]
        record = run(part, min(part.seconds, end - time.monotonic()), args.out / f'{name}.log')
        (args.out / f'{name}.json').write_text(json.dumps(dataclasses.asdict(record)))
        print(f'{name}: {record.end}, {record.seconds:.0f} s', flush=True)
        passed = write_report(args.out, lines)
    print(f'the report is in {args.out / "report.md"}')
    sys.exit(0 if passed else 1)


if __name__ == '__main__':
    main()

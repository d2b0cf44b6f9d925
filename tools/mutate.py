"""Plants one mistake at a time in a copy of the checkout, and looks whether the tests see it.

mutate.py [--room lora] [--line mmdet_gdino_lora/retain.py] [--jobs 2]

The mistakes are listed in tools/mutations.py. For each the test files that it names are run, up to
the first failure; before, all of them are run on the code as it is. More than one survivor, or a
mistake whose text is not found exactly once, ends it with status 1.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Optional

from mutations import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parent.parent
#: How many may go unseen.
SURVIVORS = 1
#: A mistake may make a test wait for ever.
SECONDS = 900


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description='Plant mistakes and see the tests catch them')
    arguments.add_argument('--room', choices=sorted({m.room for m in MUTATIONS}))
    arguments.add_argument('--line', default='', help='part of FILE: WHAT, as in the table')
    arguments.add_argument('--jobs', type=int, default=1, help='how many at a time')
    args = arguments.parse_args()
    chosen = [
        mutation
        for mutation in MUTATIONS
        if args.room in (None, mutation.room) and args.line in title(mutation)
    ]
    rotten = [message for mutation in chosen if (message := misplaced(mutation, ROOT))]
    if rotten:
        sys.exit('\n'.join(rotten))
    with tempfile.TemporaryDirectory() as folder:
        checkout = copied(Path(folder) / 'whole')
        killer = failing_test(checkout, sorted({test for m in chosen for test in m.tests}))
        if killer:
            sys.exit(f'the tests fail before anything is planted: {killer}')
        survivors = sum(plant_all(chosen, Path(folder), args.jobs))
    print(f'{survivors} of {len(chosen)} survived', flush=True)
    sys.exit(survivors > SURVIVORS)


def title(mutation: Mutation) -> str:
    """File and description of a mistake, as the table shows them.

    Args:
        mutation: The mistake.

    Returns:
        One line.
    """
    return f'{mutation.file}: {mutation.what}'


def misplaced(mutation: Mutation, checkout: Path) -> Optional[str]:
    """Whether the code that a mistake is planted in has moved away, or no longer takes it.

    Args:
        mutation: The mistake.
        checkout: Folder of the checkout.

    Returns:
        A sentence where its text isn't found exactly once or the rest is no Python, else None.
    """
    path = checkout / mutation.file
    code = path.read_text(encoding='utf-8') if path.is_file() else ''
    count = code.count(mutation.old)
    if count != 1:
        return f'{title(mutation)}: its text is there {count} times; mend tools/mutations.py'
    try:
        compile(code.replace(mutation.old, mutation.new), mutation.file, 'exec')
    except SyntaxError as error:
        return f'{title(mutation)}: {error}; mend tools/mutations.py'
    return None


def copied(folder: Path) -> Path:
    """Copies what git knows of this checkout, and what it does not ignore.

    Args:
        folder: Where to; made.

    Returns:
        The folder.
    """
    command = ['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard']
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split('\0')):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def plant_all(mutations: Sequence[Mutation], folder: Path, jobs: int) -> Iterable[bool]:
    """Plants every mistake and prints a line for each.

    Args:
        mutations: The mistakes.
        folder: Where copies of the checkout are made, one for each of ``jobs``.
        jobs: How many are tried at a time.

    Yields:
        Whether a mistake that is none of the equivalent ones survived.
    """
    free = [copied(folder / f'copy{number}') for number in range(jobs)]

    def plant(mutation: Mutation) -> tuple[int, Optional[str]]:
        checkout = free.pop()
        path = checkout / mutation.file
        code = path.read_text(encoding='utf-8')
        line = code[: code.index(mutation.old)].count('\n') + 1
        path.write_text(code.replace(mutation.old, mutation.new), encoding='utf-8')
        try:
            return line, failing_test(checkout, mutation.tests)
        finally:
            path.write_text(code, encoding='utf-8')
            free.append(checkout)

    with ThreadPoolExecutor(jobs) as pool:
        for mutation, (line, killer) in zip(mutations, pool.map(plant, mutations)):
            fate = f'killed by {killer}' if killer else 'SURVIVED'
            if not killer and mutation.equivalent:
                fate = f'equivalent: {mutation.equivalent}'
            print(f'{mutation.file}:{line}  {mutation.what}  {fate}', flush=True)
            yield not killer and mutation.equivalent is None


def failing_test(checkout: Path, tests: Sequence[str]) -> Optional[str]:
    """Runs tests up to the first failure.

    Args:
        checkout: Folder of the checkout.
        tests: Test files, or tests in them.

    Returns:
        The test that failed; None where all passed.

    Raises:
        RuntimeError: pytest found nothing to run.
    """
    command = [sys.executable, '-m', 'pytest', '-x', '-o', 'addopts=', '-p', 'no:cacheprovider']
    environment = dict(os.environ, PYTHONDONTWRITEBYTECODE='1', OMP_NUM_THREADS='1')
    try:
        done = subprocess.run(
            [*command, '-q', '--no-header', '-rfE', *tests],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f'{SECONDS} seconds without an end'
    if done.returncode == 0:
        return None
    if done.returncode in (4, 5):  # a wrong name, or no test of that name
        raise RuntimeError(f'{tests}: {done.stdout[-500:]}{done.stderr[-500:]}')
    named = re.search(r'^(?:FAILED|ERROR) (\S+)', done.stdout, flags=re.M)
    return named.group(1) if named else 'an error at import'


if __name__ == '__main__':
    main()

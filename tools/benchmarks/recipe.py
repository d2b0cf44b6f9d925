"""Which settings fit few images: those that `new-config` writes, beside others.

    python tools/benchmarks/recipe.py [--photos FOLDER ...] [--shots 1 5 10 0] [--only REGEX]

Sets: the demo's drawn shapes (its new classes), and every FOLDER of labelled photos that
new-config can read. A number of images of every class is drawn from each by seed (`--shots`; 0:
all), and from the rest a fourth as many to validate on, at least one (with all, a fifth of them).
A contender is the config that new-config writes for these images on the base of the drawn shapes,
with some settings changed. AP and AP50 are those on the test images, by which nothing is chosen: of
the last iteration, of the checkpoint that was best in validation, and with the adapter's strength
(0.5, 0.75 or 1) that was. Images are small (`--pixels`), which makes it cheap.

Prints, for every contender, the mean and the standard deviation over seeds, and the mean over seeds
of what it has before the first contender on the same images. What was measured stays in `--out`, so
that a run that was stopped goes on; several processes can share the work.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tables import spread  # noqa: E402

from gdino_lora import run  # noqa: E402

RAW = argparse.RawDescriptionHelpFormatter
#: What new-config wrote before anything was measured, where it was something else.
EARLIER: dict[str, Any] = {'steps': 300, 'most_epochs': 60}


def contenders() -> dict[str, dict[str, Any]]:
    """What each changes: keys of the config, or of the schedule and the augmentation."""
    lr, preset = 'optim_wrapper.optimizer.lr', 'model.lora.preset'
    return {
        'as before': EARLIER,
        'as it is written': {},
        'half the steps': {**EARLIER, 'steps': 150, 'most_epochs': 30},
        'twice the steps': {**EARLIER, 'steps': 600, 'most_epochs': 120},
        '300 steps however few images': {**EARLIER, 'most_epochs': 300},
        'lr 0.001': {**EARLIER, lr: 0.001},
        'lr 0.006': {**EARLIER, lr: 0.006},
        'encoder+decoder': {**EARLIER, preset: ['encoder', 'decoder']},
        'decoder': {**EARLIER, preset: 'decoder'},
        'r=8': {**EARLIER, 'model.lora.r': 8, 'model.lora.lora_alpha': 16},
        'augmented': {**EARLIER, 'augment': 'crops'},
        'augmented, not cropped': {**EARLIER, 'augment': 'scales'},
        'augmented, colours too': {**EARLIER, 'augment': 'colours'},
        'plateau': {**EARLIER, 'plateau': True},
        'head and text first': {**EARLIER, 'first': 1 / 3},
    }


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a contender on some images of a set."""

    contender: str
    photos: str
    shots: int
    seed: int

    def path(self, out: str) -> Path:
        """Where its figures lie."""
        parts = [Path(self.photos).name, str(self.shots), str(self.seed), self.contender]
        return Path(out) / (re.sub(r'\W+', '_', '-'.join(parts)) + '.json')


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument('--photos', nargs='*', default=[], metavar='FOLDER')
    parser.add_argument('--shots', nargs='+', type=int, default=[1, 5, 10, 0])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--only', default='', help='contenders whose name matches this expression')
    parser.add_argument('--no-shapes', action='store_true', help='the folders alone')
    parser.add_argument('--pixels', type=int, default=128)
    parser.add_argument('--out', default='work_dirs/recipe')
    parser.add_argument('--table', action='store_true', help='what is there; nothing is measured')
    parser.add_argument('--cell', nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        name, photos, shots, seed = args.cell
        from recipe_run import measure

        cell = Cell(name, photos, int(shots), int(seed))
        result = measure(cell, contenders()[name], cell.path(args.out), args.pixels)
        cell.path(args.out).write_text(json.dumps(result))
        print(cell, result, flush=True)
        return
    sets = [*([] if args.no_shapes else ['shapes']), *args.photos]
    names = [name for name in contenders() if re.search(args.only, name)]
    cells = [
        Cell(name, photos, shots, seed)
        for seed in args.seeds
        for name in names
        for shots in args.shots
        for photos in sets
    ]
    for cell in [] if args.table else cells:
        with claimed(cell.path(args.out)) as mine:
            if mine:
                own = [cell.contender, cell.photos, str(cell.shots), str(cell.seed)]
                options = ['--out', args.out, '--pixels', str(args.pixels)]
                subprocess.run([sys.executable, __file__, *options, '--cell', *own], check=True)
    print(table(cells, args.out))


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether a cell is to be measured by this process: it isn't done, and no other is at it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.lock'), 'w', encoding='utf-8') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield not path.is_file()


def table(cells: list[Cell], out: str) -> str:
    """What there is, as Markdown: a row for each set, number of images and contender."""
    found: dict[tuple, dict[int, dict[str, Any]]] = {}
    for cell in cells:
        if cell.path(out).is_file():
            key = (Path(cell.photos).name, cell.shots, cell.contender)
            found.setdefault(key, {})[cell.seed] = json.loads(cell.path(out).read_text())
    first = cells[0].contender
    lines = [
        f'| set | images a class | | AP50, last | before `{first}` | AP50, best in validation '
        '| AP50, strength chosen | AP, last | iterations | time |',
        '|---|--:|---|' + '--:|' * 7,
    ]
    for (photos, shots, name), rows in sorted(found.items(), key=lambda item: item[0][:2]):
        known = found.get((photos, shots, first), {})
        both = sorted(rows.keys() & known.keys())
        gains = [rows[s]['last']['ap50'] - known[s]['last']['ap50'] for s in both]
        cells_ = [
            photos,
            str(shots or 'all'),
            f'{name} ({len(rows)})',
            spread([row['last']['ap50'] for row in rows.values()]),
            '' if name == first or not gains else f'{statistics.mean(gains):+.3f}',
            spread([row['at best']['ap50'] for row in rows.values()]),
            spread([row['with strength']['ap50'] for row in rows.values()]),
            spread([row['last']['ap'] for row in rows.values()]),
            f'{statistics.mean(row["iterations"] for row in rows.values()):.0f}',
            f'{statistics.mean(row["seconds"] for row in rows.values()):.0f} s',
        ]
        lines.append('| ' + ' | '.join(cells_) + ' |')
    return '\n'.join(lines)


if __name__ == '__main__':
    run(main)

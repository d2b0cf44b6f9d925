"""The page: one file without a reference to anything outside it."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import jinja2  # torch stands on it
import numpy as np
from markupsafe import Markup

from gdino_lora import typed
from mmdet_gdino_lora.engine.atomic import write_whole
from mmdet_gdino_lora.report.charts import DASHES, chart
from mmdet_gdino_lora.report.collect import Points, Run, curves
from mmdet_gdino_lora.report.measure import OTHERWISE, OVERLAP, Measurement

#: Most classes that the confusion table has rows for.
MOST_ROWS = 30
#: What ``sweep`` measures.
SIDES = dict(new='the new task', old='what the base knew')
#: Losses of the decoder's last layer, by this project's names and by mmdet's.
LAST_LAYER = r'loss_(ce|cls|bbox|giou|iou)'
#: Metrics between 0 and 1 over all sizes and classes (CocoMetric's of one end in ``_precision``).
METRICS = r'(?!.*_[sml]$)(?!.*loss)(?!.*_precision$).*(AP|acc|recall|f1).*'


def charts(run: Run, by_epoch: bool) -> list[Markup]:
    """Draws what a run has logged.

    Args:
        run: Of :func:`~.collect.read_run`.
        by_epoch: Whether validations are numbered by epochs, else by iterations.

    Returns:
        Figures; fewer where less was logged.
    """
    iterations, validations = 'iteration', 'epoch' if by_epoch else 'iteration'
    drawn = [
        ('Loss in training', curves(run.training, 'loss'), iterations, False),
        ('Its parts, last decoder layer', curves(run.training, LAST_LAYER), iterations, False),
        ('Loss of what must survive', curves(run.training, 'loss_retain.*'), iterations, False),
        ('Validation', curves(run.validation, METRICS), validations, True),
        ('Loss in validation', curves(run.validation, 'val_loss'), validations, True),
        ('Learning rate', curves(run.training, 'lr'), iterations, False),
    ]
    return [
        # More lines would share a colour and dashes.
        chart(title, dict(list(lines.items())[: len(DASHES)]), across, dots)
        for title, lines, across, dots in drawn
        if lines
    ]


class Command(NamedTuple):
    """What may come after a run.

    Attributes:
        told: What for.
        name: Of the command.
        line: As it is typed, with the run's paths.
    """

    told: str
    name: str
    line: str


def commands(run: Run, names: Sequence[str], thresholds: str) -> list[Command]:
    """Writes the commands that come next, with the run's paths.

    Args:
        run: Of :func:`~.collect.read_run`.
        names: Of the classes.
        thresholds: Path of ``thresholds.json``.

    Returns:
        In the order in which one would try them.
    """
    stem = os.path.join(run.folder, 'tuned')
    lines = [
        ('Measure it on the test set', 'test', []),
        (
            'Detect in a photo of yours',
            'image-demo',
            ['photo.jpg', '--texts', ' . '.join(names), '--thresholds', thresholds],
        ),
        (
            'Label more photos with it',
            'label',
            ['PHOTOS', '-o', 'labels.json', '--thresholds', thresholds],
        ),
        ("Write the adapter in PEFT's format", 'export', [f'{stem}_adapter']),
        ('Fold it into the base, for stock mmdet', 'merge', [f'{stem}.pth']),
        ('Measure it at several strengths', 'sweep', []),
    ]
    return [
        Command(told, name, f'{typed(name)} {shlex.join([run.config, run.checkpoint, *more])}')
        for told, name, more in lines
    ]


def confusion(table: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Chooses the rows and columns of the confusion table.

    Args:
        table: Of :meth:`~.measure.Measurement.confusion`.
        names: Of the classes.

    Returns:
        ``names``, ``rows`` and how many classes are left out: those with the fewest mistakes.
    """
    mistakes = table.sum(0)[:-1] + table.sum(1)[:-1] - 2 * table.diagonal()[:-1]
    shown = np.sort(np.argsort(-mistakes, kind='stable')[:MOST_ROWS])
    places = [*shown, len(names)]
    titles = [*(names[label] for label in shown), 'invented']
    rows = [
        (title, [(int(table[row, column]), row == column) for column in places])
        for title, row in zip(titles, places)
    ]
    rows[-1][1].pop()  # neither there nor found
    return dict(names=titles[:-1], rows=rows, left_out=len(names) - len(shown))


def scales(rows: Sequence[Mapping[str, float]]) -> Optional[Markup]:
    """Draws AP over the adapter's scale.

    Args:
        rows: ``scale``, ``new`` and, where it was measured, ``old``; empty: nothing was.

    Returns:
        A figure; None without rows.
    """
    lines: dict[str, Points] = {
        told: [(row['scale'], row[side]) for row in rows]
        for side, told in SIDES.items()
        if rows and side in rows[0]
    }
    return chart("Over the adapter's strength", lines, 'scale', True) if lines else None


def write(path: str, measurement: Measurement, **parts: Any) -> None:
    """Writes the page.

    Args:
        path: File to write.
        measurement: Of the validation set.
        **parts: What else ``page.html`` shows. Everything that isn't ``Markup`` is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters['number'] = lambda x, digits=3: '-' if x is None else f'{x:.{digits}f}'
    html = environment.get_template('page.html').render(
        measurement=measurement, overlap=OVERLAP, otherwise=OTHERWISE, sides=SIDES, **parts
    )
    write_whole(path, html)


def write_thresholds(path: str, measurement: Measurement) -> None:
    """Writes each class's threshold, null where validation can't say.

    Args:
        path: File to write, JSON.
        measurement: Of the validation set.
    """
    found = {c.name: c.threshold and c.threshold.score for c in measurement.classes}
    write_whole(path, json.dumps(found, indent=2, ensure_ascii=False) + '\n')


def title(run: Run) -> str:
    """What the page is called: the name of the run's folder."""
    return re.sub(r'[/\\]+$', '', run.folder).replace('\\', '/').rpartition('/')[2] or run.folder

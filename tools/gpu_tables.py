"""The text of `make gpu`'s report: from what its parts printed to one page of Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

#: Lines of its output that the report shows of a part that failed.
LAST_LINES = 20
STEP, PEAK = 'step (s)', 'peak (MB)'
#: Whose step the others' are divided by.
REFERENCES = ('mmdet, full', 'mmdet + PEFT, decoder', 'transformers + PEFT, decoder')


@dataclass(frozen=True)
class Record:
    """What came of one part.

    Attributes:
        title: Heading in the report.
        command: As a person types it.
        end: ``'passed'``, ``'failed'`` or ``'stopped'`` (it ran out of time).
        seconds: That it took.
        output: What it printed, errors included.
    """

    title: str
    command: str
    end: str
    seconds: float
    output: str


def report(about: Sequence[str], records: Sequence[Record]) -> str:
    """Writes the page.

    Args:
        about: Lines on the card and the versions.
        records: In the order of the page.

    Returns:
        Markdown.
    """
    page = ['# On a GPU', '', *(f'- {line}' for line in about)]
    for record in records:
        page += ['', *section(record)]
    return '\n'.join(page) + '\n'


def section(record: Record) -> list[str]:
    """Writes one part: its tables and sums, or the last lines before it failed."""
    head = [f'## {record.title}', '', f'`{record.command}`: {record.end}, {record.seconds:.0f} s.']
    found = tables(record.output)
    said = [line for line in record.output.splitlines() if _is_told(line)]
    body = ['', *said] if said else []
    for table in found:
        body += ['', *table]
        compared = ratios(table)
        if compared:
            body += ['', 'Against the others in the same run:', '', *compared]
    if record.end != 'passed':
        last = [line for line in record.output.splitlines() if line.strip()][-LAST_LINES:]
        body += ['', '```', *last, '```']
    return head + body


def _is_told(line: str) -> bool:
    """Whether a line sums up: pytest's last, the objective's check, the demo's steps."""
    counts = r'\d+ (passed|failed|skipped|error)'
    return bool(re.match(rf'{counts}|loss, ours against|left out: |\[ *\d+ s\] ', line))


def tables(output: str) -> list[list[str]]:
    """Finds the tables in an output.

    Args:
        output: With Markdown tables, among other lines.

    Returns:
        The lines of each; those of a table cut off before its second line are left out.
    """
    found: list[list[str]] = [[]]
    for line in output.splitlines():
        if line.startswith('|') and line.endswith('|'):
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return [table for table in found if len(table) > 2]


def ratios(table: Sequence[str]) -> Optional[list[str]]:
    """Divides each contender's step by the others'.

    Args:
        table: ``tools/benchmarks/step.py``'s, or another.

    Returns:
        Lines of a table; None where this one is not of steps.
    """
    head, _, *body = [[cell.strip() for cell in line.strip('|').split('|')] for line in table]
    if STEP not in head or PEAK not in head:
        return None
    rows = {row[0]: dict(zip(head, row)) for row in body}
    columns = [(STEP, "of {}'s time", name) for name in REFERENCES if name in rows]
    columns += [(PEAK, "of {}'s memory", name) for name in REFERENCES[:1] if name in rows]
    if not columns:
        return None
    heads = ['', *(text.format(name) for _, text, name in columns)]
    lines = [heads, ['---', *['--:'] * len(columns)]]
    for name, row in rows.items():
        shares = [float(row[key]) / float(rows[of][key]) for key, _, of in columns]
        lines.append([name, *(f'{share:.2f}' for share in shares)])
    return ['| ' + ' | '.join(line) + ' |' for line in lines]

"""What a training step may ask of a GPU: operations and waits, counted on the virtual device.

At 6 + 6 layers, two images and 80 names, see `tests.virtual_device.steps`. Whoever lowers a count
lowers its ceiling; `python -m tests.virtual_device --help` shows where operations come from.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.virtual_device.counts import Counts


class Ceiling(NamedTuple):
    """Of operations in the parts of a step."""

    forward: int
    backward: int
    optimizer: int = 16


#: By preset, `retain` and type of autocast.
OPERATIONS = {
    ('decoder', False, ''): Ceiling(1259, 696),
    ('decoder', False, 'bfloat16'): Ceiling(1657, 763),
    ('all', False, ''): Ceiling(1610, 2329),
    ('decoder', True, ''): Ceiling(2423, 1547),
}

#: A count this much below its ceiling asks for a lower one.
SLACK = 0.03

#: Times that the host waits: for the matching, for the names of what was found, and so on.
WAITS = dict(forward=1, backward=0, optimizer=0, prediction=3, validation=3)

#: Operations of the objective alone, with six decoder layers and the encoder.
OBJECTIVE = dict(
    plain=Ceiling(forward=229, backward=21),
    denoising=Ceiling(forward=252, backward=25),
)


def check(counts: Counts, ceiling: int, where: str) -> None:
    """Compares a count with its ceiling.

    Args:
        counts: Of some part of a step.
        ceiling: Of its operations.
        where: What it is of.

    Raises:
        AssertionError: It is above its ceiling, or so far below that the ceiling holds nothing.
    """
    count = counts.launches
    assert count <= ceiling, (
        f'{where}: {count} operations, more than {ceiling}; the most come from '
        f'{counts.by("own", "name").most_common(5)}'
    )
    assert count >= ceiling * (1 - SLACK), (
        f'{where}: {count} operations, less than {ceiling}; lower it in tests/ceilings.py'
    )

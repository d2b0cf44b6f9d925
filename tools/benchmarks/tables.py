"""What the benchmarks' tables have in common."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds.

    Args:
        values: One for each seed.

    Returns:
        ``'0.358 ± 0.012'``; of one seed its value alone.
    """
    around = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.3f}{around}'

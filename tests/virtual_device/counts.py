"""What was asked of the device: operations that launch a kernel, and where the host waited."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.virtual_device.sites import Site


class Operation(NamedTuple):
    """An operation that launches a kernel or copies memory.

    Attributes:
        site: Where it comes from; of the backward pass, where the forward operation came from.
        name: ATen's, without the overload.
        backward: Whether autograd's engine asked for it.
    """

    site: Site
    name: str
    backward: bool


class Wait(NamedTuple):
    """A moment in which the host stands still until the device has done what it was given.

    Attributes:
        kind: Why.
        stack: Innermost first.
    """

    kind: str
    stack: str


@dataclass
class Counts:
    """Of a stretch of a program.

    Attributes:
        operations: How often each was asked for.
        waits: In their order.
    """

    operations: Counter[Operation] = field(default_factory=Counter)
    waits: list[Wait] = field(default_factory=list)

    @property
    def launches(self) -> int:
        """How many operations."""
        return self.operations.total()

    def by(self, *fields: str) -> Counter[tuple]:
        """Operations by some of ``part``, ``line``, ``own``, ``name``, ``backward``."""
        sums: Counter[tuple] = Counter()
        for operation, count in self.operations.items():
            known = {**operation.site._asdict(), **operation._asdict()}
            sums[tuple(known[name] for name in fields)] += count
        return sums

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
        bytes: Read and written by operations that do little else: all but products, convolutions,
            attention and sampling.
        flops: Floating point operations of products, convolutions and attention.
    """

    operations: Counter[Operation] = field(default_factory=Counter)
    waits: list[Wait] = field(default_factory=list)
    bytes: Counter[Operation] = field(default_factory=Counter)
    flops: Counter[Operation] = field(default_factory=Counter)

    @property
    def launches(self) -> int:
        """How many operations."""
        return self.operations.total()

    @property
    def traffic(self) -> int:
        """How many bytes are read and written."""
        return self.bytes.total()

    def by(self, *fields: str, of: str = 'operations') -> Counter[tuple]:
        """Sums by some of ``part``, ``line``, ``own``, ``name``, ``backward``.

        Args:
            *fields: What to group by.
            of: ``'operations'``, ``'bytes'`` or ``'flops'``.
        """
        sums: Counter[tuple] = Counter()
        for operation, count in getattr(self, of).items():
            known = {**operation.site._asdict(), **operation._asdict()}
            sums[tuple(known[name] for name in fields)] += count
        return sums

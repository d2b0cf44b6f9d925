"""What an injection made trainable, as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import nn

from mmdet_gdino_lora.lora.inject.presets import GROUPS, group_of
from mmdet_gdino_lora.lora.state import lora_state
from mmdet_gdino_lora.lora.tensors import base_name


@dataclasses.dataclass(frozen=True)
class Report:
    """What an injection made trainable.

    Attributes:
        targets: Modules with adapters.
        trained: Names of all trained parameters, adapters included, and their sizes.
        total: Number of parameters of the detector, adapters included.
    """

    targets: tuple[str, ...]
    trained: Mapping[str, int]
    total: int

    @property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        return sum(self.trained.values())

    def table(self) -> str:
        """Group, modules with adapters, trained parameters and their share, as text."""
        rows = [('group', 'adapted modules', 'trained parameters', 'of all')]
        for group in [*GROUPS, None]:
            sizes = [size for name, size in self.trained.items() if group_of(name) == group]
            modules = sum(group_of(name) == group for name in self.targets)
            if sizes:
                rows.append((group or 'other', str(modules), f'{sum(sizes):,}', self._share(sizes)))
        sizes = list(self.trained.values())
        rows.append(('total', str(len(self.targets)), f'{sum(sizes):,}', self._share(sizes)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return '\n'.join(
            '  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
            for row in rows
        )

    def _share(self, sizes: Sequence[int]) -> str:
        return f'{100 * sum(sizes) / self.total:.2f}%'


def describe(detector: nn.Module) -> Report:
    """What is trained in an injected detector.

    Args:
        detector: The detector.

    Returns:
        The report that :func:`inject` logs.
    """
    state = lora_state(detector)
    sizes = {base_name(name): p.numel() for name, p in detector.named_parameters()}
    trained = {name: size for name, size in sizes.items() if name in state.trained}
    return Report(state.targets, trained, sum(sizes.values()))

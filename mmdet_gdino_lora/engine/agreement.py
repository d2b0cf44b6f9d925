"""What one rank knows, all ranks know one iteration later, without waiting for a GPU.

Ranks have to stop, or to give up, at the same iteration: one that goes on alone waits for the
others' gradients for ever. Reducing a flag on the GPU would be one more wait in every step. Here it
is reduced on the CPU, by gloo, in the background; it is read an iteration later, when it has long
arrived, so that all ranks read the same at the same iteration.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from mmengine.dist import get_world_size
from torch import distributed


class Agreement:
    """The largest number that any rank has told; all ranks have to tell one in every iteration."""

    def __init__(self) -> None:
        self._group = distributed.new_group(backend='gloo') if get_world_size() > 1 else None
        self._told: Optional[torch.Tensor] = None
        self._work: Any = None

    def tell(self, number: int) -> int:
        """Tells a number, and returns what is agreed on.

        Args:
            number: This rank's.

        Returns:
            With one rank its own number; with several the largest of the iteration before, 0 in the
            first.
        """
        if self._group is None:
            return number
        agreed = self.settle()
        self._told = torch.tensor(number)
        self._work = distributed.all_reduce(
            self._told, distributed.ReduceOp.MAX, group=self._group, async_op=True
        )
        return agreed

    def settle(self) -> int:
        """Waits for what was told last, so that nothing is under way any more.

        Returns:
            The largest number of all ranks; 0 where none was told.
        """
        if self._work is not None:
            self._work.wait()
        agreed = 0 if self._told is None else int(self._told)
        self._told = self._work = None
        return agreed

    def meet(self) -> None:
        """Waits until all ranks are here."""
        if self._group is not None:
            self.settle()
            distributed.barrier(group=self._group)

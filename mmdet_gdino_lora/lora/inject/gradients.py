"""Stops a run in which something that should be trained never gets a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.tensors import LABEL_EMBEDDING


class GradientCheck:
    """Watches every trained parameter until it has had a non-zero gradient.

    Gradients are looked at when a backward pass ends, all together, because mmengine clears them
    within the step; the results stay on the device until they are needed. A parameter without
    gradient is an adapter in a module that the forward pass never calls, or below a detached
    tensor: it would stay at its initial value for the whole run.

    The first factor of an adapter has no gradient before the second has left zero, so it is judged
    after the second has moved, whatever the warm-up and the accumulation of gradients. The
    denoising label embedding is not judged: classes without boxes don't reach it.

    Args:
        detector: In its final place, on its device.
        iterations: Training steps with boxes after which parameters are judged.
    """

    def __init__(self, detector: nn.Module, iterations: int = 10) -> None:
        self._parameters = {
            name: parameter
            for name, parameter in detector.named_parameters()
            if parameter.requires_grad and name != LABEL_EMBEDDING
        }
        self._second_factors = {
            name: self._parameters.get(name.replace('.lora_A.', '.lora_B.'))
            for name in self._parameters
            if '.lora_A.' in name
        }
        self._moved: set[str] = set()
        self._reached: list[str] = []
        self._looks: list[tuple[list[str], Tensor]] = []
        self._handles = {
            name: parameter.register_post_accumulate_grad_hook(partial(self._reach, name))
            for name, parameter in self._parameters.items()
        }
        self._iterations = self._left = iterations

    @property
    def done(self) -> bool:
        """Whether every parameter has been seen to learn."""
        return not self._handles

    def after_step(self, num_boxes: int) -> None:
        """Counts a training step and, after enough of them, judges.

        Args:
            num_boxes: Boxes in the batch; steps without any don't count.

        Raises:
            ConfigError: Naming the parameters that never had a gradient.
        """
        if self.done or not num_boxes:
            return
        self._left -= 1
        if self._left > 0:
            return
        self._left = self._iterations
        for name in self._seen():
            self._handles.pop(name).remove()
            del self._parameters[name]
        dead = [n for n in self._parameters if n not in self._second_factors or n in self._moved]
        if dead:
            raise ConfigError(
                f'{len(dead)} trained parameters had no gradient in {self._iterations} iterations '
                f'({", ".join(dead[:3])}{", ..." if len(dead) > 3 else ""}): their modules are not '
                'part of the loss; take them out of lora.target_modules or trainable, or set '
                'check_adapters=False to go on.'
            )
        self._moved.update(name for name, moved in self._second_factors_moved() if moved)

    def _reach(self, name: str, parameter: Tensor) -> None:
        if not self._reached:
            torch.autograd.Variable._execution_engine.queue_callback(self._look)
        self._reached.append(name)

    def _look(self) -> None:
        names, self._reached = self._reached, []
        grads = [
            (name, grad)
            for name in names
            if name in self._parameters and (grad := self._parameters[name].grad) is not None
        ]
        if grads:
            self._looks.append(([n for n, _ in grads], _not_zero([grad for _, grad in grads])))

    def _seen(self) -> set[str]:
        """Parameters that have had a gradient."""
        looks, self._looks = self._looks, []
        if not looks:
            return set()
        flags = torch.cat([found for _, found in looks]).tolist()
        names = [name for names, _ in looks for name in names]
        return {name for name, flag in zip(names, flags) if flag}

    def _second_factors_moved(self) -> Iterator[tuple[str, bool]]:
        """First factors, and whether what they wait for has left zero, or isn't trained."""
        waiting = {name: b for name, b in self._second_factors.items() if b is not None}
        yield from ((name, True) for name in self._second_factors.keys() - waiting.keys())
        if waiting:
            yield from zip(waiting, _not_zero(list(waiting.values())).tolist())


@torch.no_grad()
def _not_zero(tensors: list[Tensor]) -> Tensor:
    """Whether each holds anything but zeros; inf and nan (fp16 before its scale fits) do."""
    return torch.stack([norm.float() for norm in torch._foreach_norm(tensors, torch.inf)]) != 0

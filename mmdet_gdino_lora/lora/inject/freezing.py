"""What is trained beside the adapters, and the frozen parts' mode."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from peft import LoraConfig
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.state import lora_state
from mmdet_gdino_lora.lora.tensors import LABEL_EMBEDDING, base_name

BOX_HEAD = r'^bbox_head\.reg_branches\.'


def free_patterns(
    detector: nn.Module, config: LoraConfig, train_box_head: bool, trainable: Sequence[str]
) -> list[str]:
    """Patterns of the parameters that are trained whole, checked to match something.

    Args:
        detector: A detector that has not been injected yet.
        config: With ``modules_to_save``.
        train_box_head: Whether the box regression branches are trained.
        trainable: The user's patterns.

    Returns:
        Regular expressions for ``re.search`` on plain names.

    Raises:
        ConfigError: For a pattern that is none, or that matches nothing.
    """
    parameters = [name for name, _ in detector.named_parameters()]
    patterns = [BOX_HEAD] if train_box_head else []
    if isinstance(trainable, str):
        trainable = [trainable]
    saved = [rf'(^|\.){re.escape(name)}\.' for name in config.modules_to_save or ()]
    asked = dict.fromkeys(trainable, 'trainable')
    asked.update(zip(saved, [f'lora.modules_to_save={config.modules_to_save}'] * len(saved)))
    for pattern, source in asked.items():
        try:
            matches = any(re.search(pattern, name) for name in parameters)
        except re.error as error:
            raise ConfigError(
                f'{source}: {pattern!r} is no regular expression ({error}).'
            ) from None
        if not matches:
            raise ConfigError(
                f'{source}: {pattern!r} matches no parameter; names look like '
                f'{parameters[0]!r} or {parameters[-1]!r}.'
            )
    return patterns + list(asked)


def free_parameters(detector: nn.Module, patterns: Sequence[str]) -> None:
    """Makes parameters beside the adapters trainable.

    The denoising queries' label embedding is among them where the base didn't bring it: its rows
    depend on the number of classes, and random rows that stay frozen would feed noise to the
    decoder for good.

    Args:
        detector: An injected detector.
        patterns: As of :func:`free_patterns`.

    Raises:
        ConfigError: For a pattern that matches nothing that stays trainable.
    """
    base = lora_state(detector).base
    for name, parameter in detector.named_parameters():
        absent = name == LABEL_EMBEDDING and (base is None or LABEL_EMBEDDING in base.absent)
        if absent or any(re.search(pattern, base_name(name)) for pattern in patterns):
            parameter.requires_grad_(True)
    # Backbones freeze their frozen_stages again whenever training mode is set.
    training = detector.training
    detector.train()
    trained = {base_name(name) for name, p in detector.named_parameters() if p.requires_grad}
    detector.train(training)
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in trained):
            raise ConfigError(
                f'{pattern!r} in trainable or lora.modules_to_save matches only parameters that '
                'backbone.frozen_stages freezes; set backbone.frozen_stages=-1 (the base stays '
                'frozen anyway) or leave it out.'
            )


def set_frozen_eval(detector: nn.Module) -> None:
    """Puts the frozen parts into eval mode: no dropout, no stochastic depth, no moving averages.

    A module that holds parameters or buffers, none of which is trained, goes to eval mode with all
    that is inside. Parameterless modules (dropout, stochastic depth) follow the module that they
    stand in.

    Args:
        detector: A detector in training mode.
    """
    trained: dict[nn.Module, bool] = {}

    def scan(module: nn.Module) -> bool:
        trained[module] = any(p.requires_grad for p in module._parameters.values() if p is not None)
        for child in module._modules.values():
            if child is not None and scan(child):
                trained[module] = True
        return trained[module]

    def freeze(module: nn.Module) -> None:
        for child in module._modules.values():
            if child is None:
                continue
            if not trained[child] and _holds_state(child):
                child.eval()
            elif trained[child]:
                freeze(child)

    if scan(detector):
        freeze(detector)


@contextmanager
def evaluating(detector: nn.Module) -> Iterator[None]:
    """Within, all modules are in eval mode; afterwards each is in its own mode again.

    As ``detector.eval()`` and back, in a hundredth of the time: a teacher is asked in every step.

    Args:
        detector: A detector in any mode.

    Yields:
        Nothing.
    """
    training = []
    modules = [detector]
    while modules:
        module = modules.pop()
        if module.training:
            training.append(vars(module))
        modules.extend(child for child in module._modules.values() if child is not None)
    for attributes in training:
        attributes['training'] = False
    try:
        yield
    finally:
        for attributes in training:
            attributes['training'] = True


def _holds_state(module: nn.Module) -> bool:
    return any(m._parameters or m._buffers for m in module.modules())

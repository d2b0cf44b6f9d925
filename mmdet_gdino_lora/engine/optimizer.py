"""mmengine's default ways to build an optimizer, under mmdet's scope, for detectors with a base.

mmengine looks for what a config names among mmdet's classes first and among its own after that. The
classes here have the names of its defaults, so that they serve who adds two lines to a config. To
models of other projects they do what mmengine's do.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmdet.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.logging import MMLogger
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mmdet_gdino_lora.engine.learning_rates import key_of
from mmdet_gdino_lora.engine.unfit import need_gpu
from mmdet_gdino_lora.errors import ConfigError


@OPTIM_WRAPPERS.register_module(name='AmpOptimWrapper')
class GpuAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's ``AmpOptimWrapper``, which tells in one sentence that there is no GPU.

    Args:
        *args: As for mmengine's.
        **kwargs: The same.

    Raises:
        ConfigError: There is none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        need_gpu()
        super().__init__(*args, **kwargs)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name='DefaultOptimWrapperConstructor')
class FrozenBaseConstructor(DefaultOptimWrapperConstructor):
    """mmengine's default constructor, for a model of which most is frozen on purpose.

    Its warning for every parameter that needs no gradient is left out, and trained parameters that
    a multiplier of 0 would hold in place are told.

    Args:
        *args: As for mmengine's.
        **kwargs: The same.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Builds.

        Args:
            model: To be optimized.

        Returns:
            The optimizer in its wrapper.

        Raises:
            ConfigError: A multiplier of 0 holds for what is trained.
        """
        detector: Any = model.module if is_model_wrapper(model) else model
        if not hasattr(detector, 'check_adapters'):
            return super().__call__(model)
        with _without_the_frozen():
            built = super().__call__(model)
        held = _held(detector, built)
        if held and self.base_lr:
            self._tell(held, detector.check_adapters)
        return built

    def _tell(self, held: list[str], stops: bool) -> None:
        key = key_of(self.paramwise_cfg.get('custom_keys', ()), held[0])
        where = f'custom_keys[{key!r}].lr_mult=0' if key else 'a multiplier of 0'
        sentence = (
            f'optim_wrapper.paramwise_cfg: {where} holds {len(held)} trained weights in place '
            f'({held[0]}, for one), though they are listed as trained; leave the key out (the base '
            'is frozen anyway), or take these modules out of model.lora and model.trainable'
        )
        if stops:
            raise ConfigError(f'{sentence}; model.check_adapters=False goes on')
        MMLogger.get_current_instance().warning(sentence)


def _held(detector: nn.Module, built: OptimWrapper) -> list[str]:
    """Names of trained parameters that the optimizer has under a learning rate of 0."""
    still = {
        id(parameter)
        for group in built.optimizer.param_groups
        if group['lr'] == 0
        for parameter in group['params']
        if parameter.requires_grad
    }
    return [name for name, parameter in detector.named_parameters() if id(parameter) in still]


@contextmanager
def _without_the_frozen() -> Iterator[None]:
    logger = MMLogger.get_current_instance()
    logger.addFilter(_says_more)
    try:
        yield
    finally:
        logger.removeFilter(_says_more)


def _says_more(record: logging.LogRecord) -> bool:
    """Tells other records from mmengine's for a frozen parameter."""
    return not record.getMessage().endswith('is skipped since its requires_grad=False')

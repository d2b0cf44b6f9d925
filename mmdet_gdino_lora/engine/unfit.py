"""Ways of mmengine's to run a model that this detector can't go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmengine.device import get_device

from mmdet_gdino_lora.errors import ConfigError

_SHARDING = ('FSDPStrategy', 'DeepSpeedStrategy', 'ColossalAIStrategy')


def check_fit(cfg: Mapping[str, Any]) -> None:
    """Checks what a run's config asks of the model as a whole.

    Args:
        cfg: The runner's config.

    Raises:
        ConfigError: It is to be compiled whole, or its weights are to be spread over ranks.
    """
    # torch can't trace captions (Python objects) and the matching (scipy, on the host).
    setting = cfg.get('compile')
    if setting not in (None, False):
        raise ConfigError(
            f'compile={setting!r} compiles the whole training step, whose captions and matching '
            "torch.compile cannot trace; set compile=None and custom_hooks=[dict(type='CompileHook'"
            ')], which compiles the image tower'
        )
    strategy = cfg.get('strategy') or {}
    kind = strategy.get('type') if isinstance(strategy, Mapping) else type(strategy).__name__
    if str(kind).rpartition('.')[2] in _SHARDING:
        raise ConfigError(
            f'strategy.type={kind!r} spreads the weights over the ranks, and adapters on a frozen '
            'base have not been trained or saved that way; leave strategy out, so that every rank '
            'holds the whole model (base_dtype="bfloat16" halves the base)'
        )


def check_amp(cfg: Mapping[str, Any]) -> None:
    """Checks that there is something to run mixed precision on.

    Args:
        cfg: The runner's config.

    Raises:
        ConfigError: It asks for mixed precision, and there is no GPU.
    """
    kind = (cfg.get('optim_wrapper') or {}).get('type')
    if str(kind).rpartition('.')[2] == 'AmpOptimWrapper':
        need_gpu()


def need_gpu(setting: str = "optim_wrapper.type='AmpOptimWrapper' (--amp)") -> None:
    """Refuses mixed precision without a GPU.

    Args:
        setting: What asks for it.

    Raises:
        ConfigError: torch finds none.
    """
    if get_device() == 'cpu':
        raise ConfigError(f'{setting} needs a GPU, and torch finds none; leave it out on a CPU')

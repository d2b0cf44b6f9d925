"""What a config's learning rate multipliers, written for whole towers, do to the adapters there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Optional


def key_of(keys: Iterable[str], name: str) -> Optional[str]:
    """Finds what ``paramwise_cfg`` says of a parameter, as mmengine's optimizer constructor does.

    Args:
        keys: Of ``custom_keys``.
        name: Of the parameter.

    Returns:
        The longest key that the name holds, of several the first by the alphabet; None: none.
    """
    return max(sorted(key for key in keys if key in name), key=len, default=None)


def rate_of(config: Mapping[str, Any], name: str) -> Optional[float]:
    """Says how fast a parameter learns at first.

    Args:
        config: A run's config.
        name: Of the parameter.

    Returns:
        The optimizer's learning rate times the multiplier of the longest key that the name holds;
        None where the config has no optimizer.
    """
    wrapper = config.get('optim_wrapper') or {}
    rate = (wrapper.get('optimizer') or {}).get('lr')
    if not isinstance(rate, (int, float)):
        return None
    keys = (wrapper.get('paramwise_cfg') or {}).get('custom_keys') or {}
    key = key_of(keys, name)
    return float(rate) * (1.0 if key is None else keys[key].get('lr_mult', 1.0))


def multiplied_rates(config: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Tells which of a run's ``paramwise_cfg`` entries also change the learning rate of adapters.

    mmdet's configs slow down backbone and text tower for full fine-tuning.

    Args:
        config: A run's config.
        names: Of the trained parameters.

    Returns:
        For each such entry, a phrase with its key, its multiplier and a number of adapter weights.
    """
    wrapper = config.get('optim_wrapper') or {}
    keys = (wrapper.get('paramwise_cfg') or {}).get('custom_keys') or {}
    counts = Counter(key_of(keys, name) for name in names if '.lora_' in name)
    return [
        f'{key!r} (lr_mult={keys[key]["lr_mult"]:g}) holds {count} adapter weights'
        for key, count in counts.items()
        if key is not None and keys[key].get('lr_mult', 1) != 1
    ]

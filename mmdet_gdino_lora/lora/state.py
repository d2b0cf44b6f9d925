"""What a detector remembers about its base and its adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Optional

from peft import LoraConfig
from torch import nn


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen weights under the adapters.

    Attributes:
        source: Path or URL that they came from.
        fingerprint: Digest of the weights of each top-level module.
        absent: Names of parameters that the file didn't bring (the denoising label embedding for
            another number of classes); they stay random and are trained.
    """

    source: str
    fingerprint: Mapping[str, str]
    absent: frozenset[str] = frozenset()


@dataclasses.dataclass
class LoraState:
    """Kept on the detector as ``lora_state``.

    Attributes:
        base: None while the base is random.
        config: The resolved adapter config; None before injection.
        preset: As in the user's config, for the model card.
        targets: Names of the modules with adapters.
    """

    base: Optional[Base] = None
    config: Optional[LoraConfig] = None
    preset: Any = None
    targets: tuple[str, ...] = ()


def lora_state(detector: nn.Module) -> LoraState:
    """The detector's state, made on first use.

    Args:
        detector: A detector.

    Returns:
        The one object that belongs to this detector.
    """
    if not hasattr(detector, 'lora_state'):
        detector.lora_state = LoraState()
    return detector.lora_state

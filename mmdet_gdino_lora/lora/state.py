"""What a detector remembers about its base and its adapters."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Optional, Union

from peft import LoraConfig
from torch import Tensor, nn

ADAPTER = 'default'
"""PEFT's name of the adapter that is trained."""


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen weights under the adapters.

    Attributes:
        source: Path or URL that they came from, as the user gave it; empty where it isn't known,
            in which case checkpoints have to hold the base as well.
        fingerprint: Digest of the weights of each top-level module.
        absent: Names of parameters that the file didn't bring (the denoising label embedding for
            another number of classes); they stay random and are trained.
        path: Absolute path of a local file, for runs that start elsewhere.
    """

    source: str
    fingerprint: Mapping[str, str]
    absent: frozenset[str] = frozenset()
    path: str = ''

    def __str__(self) -> str:
        digest = ''.join(value[:2] for _, value in sorted(self.fingerprint.items()))
        return f'{os.path.basename(self.source) or "unnamed"} (fingerprint {digest[:12]})'


@dataclasses.dataclass
class LoraState:
    """Kept on the detector as ``lora_state``.

    Attributes:
        base: None while the base is random.
        config: The resolved adapter config; None before injection.
        preset: As in the user's config, for the model card.
        targets: Names of the modules with adapters.
        changed: Plain names of further weights that no longer are the base's: those that the
            adapter's initialisation rewrote (PiSSA), and those that came with an adapter.
        full_checkpoint: Whether checkpoints hold the base as well.
        freed: For every adapter loaded, the weights that it changes without low-rank factors.
        base_values: The base's values of those weights.
        scalings: By module and adapter, the scaling of the whole adapter.
        active: Name of the adapter that is switched on, or weights by name.
    """

    base: Optional[Base] = None
    config: Optional[LoraConfig] = None
    preset: Any = None
    targets: tuple[str, ...] = ()
    changed: set[str] = dataclasses.field(default_factory=set)
    full_checkpoint: bool = False
    freed: dict[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    base_values: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    scalings: dict[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    active: Union[str, Mapping[str, float]] = ADAPTER


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


def needs_base(config: LoraConfig) -> bool:
    """Whether an adapter's initial values depend on the weights that it is put on.

    Args:
        config: The adapter's config.

    Returns:
        True for DoRA, PiSSA, OLoRA and the like.
    """
    initial = config.init_lora_weights
    return (
        config.use_dora
        or config.kasa_config is not None
        or (isinstance(initial, str) and initial.lower() != 'gaussian')
    )

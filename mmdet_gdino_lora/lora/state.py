"""What a detector remembers about its base and its adapters."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, Optional

from peft import LoraConfig
from torch import nn

from mmdet_gdino_lora.lora.switch import Switch
from mmdet_gdino_lora.lora.tensors import ADAPTER, base_name, is_factor, places


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


@dataclasses.dataclass(frozen=True)
class Injection:
    """What was decided when the adapter was put in, and stays so.

    ``requires_grad`` is no place to ask later: mmengine's ``AveragedModel`` switches it off in its
    copy of the detector, and backbones switch it off for their ``frozen_stages``.

    Attributes:
        config: The resolved adapter config.
        preset: As in the user's config, for the model card.
        targets: Names of the modules with adapters.
        trained: Names of the parameters that are trained, adapters included.
        buffers: Names of the buffers beside those, such as a norm's running statistics.
        rewritten: Names of the base's weights that the adapter's initialisation changed (PiSSA).
    """

    config: LoraConfig
    preset: Any
    targets: tuple[str, ...]
    trained: frozenset[str]
    buffers: frozenset[str] = frozenset()
    rewritten: frozenset[str] = frozenset()


class LoraState:
    """Answers for one detector what is trained, what differs from its base, and what is active.

    Kept on the detector as ``lora_state`` and copied with it. Others ask, and tell it what happened
    by its methods; nobody writes into it. Names are plain ones, see :func:`~.tensors.base_name`.

    Attributes:
        base: None while the base is random.
        injection: None before injection.
        full_checkpoint: Whether checkpoints hold the base as well.
        switch: Which adapters are on.
    """

    def __init__(self) -> None:
        self.base: Optional[Base] = None
        self.injection: Optional[Injection] = None
        self.full_checkpoint = False
        self.switch = Switch()
        self._brought: frozenset[str] = frozenset()
        self._changed: Optional[frozenset[str]] = None
        self._loaded = False
        self._taught: dict[str, Optional[frozenset[str]]] = {ADAPTER: frozenset()}

    # ----------------------------------------------------------------------------- what happened

    def stands_on(self, base: Optional[Base]) -> None:
        """A base has been loaded, over whatever a checkpoint may have brought before.

        Args:
            base: None for random weights.
        """
        self.base = base
        self._loaded = True
        self._brought, self._changed = frozenset(), None
        self.switch.forget_base()

    def injected(self, injection: Injection) -> None:
        """An adapter has been put in.

        Args:
            injection: What was decided there.
        """
        self.injection, self._changed = injection, None
        self.switch.adapters_changed()

    def brought(self, names: Iterable[str]) -> None:
        """Weights of the base have been replaced by those of a checkpoint.

        Args:
            names: Plain names; factors of adapters among them don't count.
        """
        self._loaded = True
        self._brought |= {name for name in names if not is_factor(name)}
        self._changed = None

    def shown(self, names: Iterable[str]) -> None:
        """Training has shown names to the trained adapter.

        Args:
            names: What captions say for the classes. Where it isn't known what the adapter was
                taught before, these are not taken for all.
        """
        before = self._taught[ADAPTER]
        if before is not None and not before.issuperset(names):
            self._taught[ADAPTER] = before.union(names)

    def knows(self, adapter: str, names: Optional[Iterable[str]]) -> None:
        """The file of an adapter says which names it was taught.

        Args:
            adapter: Its name.
            names: What captions said for the classes; None: the file doesn't say.
        """
        self._taught[adapter] = None if names is None else frozenset(names)

    def keeps_base_in_checkpoints(self, full: bool) -> None:
        """The user has decided what checkpoints hold.

        Args:
            full: Whether the base is in them.
        """
        self.full_checkpoint = full

    # ------------------------------------------------------------------------------- what is asked

    @property
    def awaits_weights(self) -> bool:
        """Whether neither a base nor a checkpoint has been loaded yet."""
        return not self._loaded

    @property
    def adapter_config(self) -> LoraConfig:
        """The resolved adapter config, for those who know that there is one."""
        assert self.injection is not None, 'a plain detector has no adapter config'
        return self.injection.config

    @property
    def config(self) -> Optional[LoraConfig]:
        """The resolved adapter config; None before injection."""
        return self.injection and self.injection.config

    @property
    def preset(self) -> Any:
        """The preset as in the user's config; None before injection."""
        return self.injection and self.injection.preset

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the modules with adapters."""
        return self.injection.targets if self.injection else ()

    @property
    def trained(self) -> frozenset[str]:
        """Names of the parameters that are trained, adapters included."""
        return self.injection.trained if self.injection else frozenset()

    @property
    def changed(self) -> frozenset[str]:
        """Names of the weights and buffers that no longer are the base's, adapters left out.

        They are trained, beside what is trained, rewritten by the adapter's initialisation, brought
        by a checkpoint, or absent from the base.
        """
        if self._changed is None:
            names = self._brought | (self.base.absent if self.base else frozenset())
            if self.injection:
                names |= {name for name in self.injection.trained if not is_factor(name)}
                names |= self.injection.buffers | self.injection.rewritten
            self._changed = names
        return self._changed

    def taught(self, adapter: str) -> Optional[frozenset[str]]:
        """Names that an adapter was taught: what captions said for the classes.

        Args:
            adapter: Its name.

        Returns:
            The names; None where its file doesn't say.
        """
        return self._taught.get(adapter)

    def names_to_save(self, detector: nn.Module) -> set[str]:
        """What the base alone doesn't give: the trained adapter and whatever else differs.

        Args:
            detector: The detector that this state belongs to.

        Returns:
            Names of parameters and buffers, as the injected detector has them.
        """
        changed = self.changed
        return {
            name
            for name in places(detector)
            if is_factor(name, ADAPTER) or base_name(name) in changed
        }


def lora_state(detector: nn.Module) -> LoraState:
    """The detector's state, made on first use.

    Args:
        detector: A detector.

    Returns:
        The one object that belongs to this detector.
    """
    state = getattr(detector, 'lora_state', None)
    if state is None:
        state = LoraState()
        object.__setattr__(detector, 'lora_state', state)
    return state

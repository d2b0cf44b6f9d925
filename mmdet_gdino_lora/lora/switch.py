"""One base under several adapters: which of them act now, and the weights that go with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Callable, Union

import torch
from torch import Tensor, nn

from mmdet_gdino_lora.lora.tensors import ADAPTER, LABEL_EMBEDDING, base_name, is_factor, places
from mmdet_gdino_lora.peft_layers.layers import (
    BaseTunerLayer,
    enable,
    every_adapter_layer,
    set_active,
)

Active = Union[str, Mapping[str, float]]
"""The name of an adapter, or weights by name; the base is the empty combination."""


@dataclasses.dataclass
class _Layer:
    """One of PEFT's layers, and by adapter the scaling that it has when it is not combined."""

    name: str
    layer: BaseTunerLayer
    scalings: dict[str, float]


class Switch:
    """Turns adapters on and off, and exchanges the weights that they change without factors.

    A weight that is changed without low-rank factors (trained whole, or a norm's running statistic)
    has one value for each adapter and one in the base, and the detector holds the one that is
    active. Lists of layers and places are made once, because distillation switches twice in a step.

    Attributes:
        active: What is on.
    """

    def __init__(self) -> None:
        self.active: Active = ADAPTER
        self._values: dict[str, dict[str, Tensor]] = {ADAPTER: {}}
        self._base: dict[str, Tensor] = {}
        self._asked: set[str] = set()
        self._layers: list[_Layer] = []
        self._places: dict[str, tuple[nn.Module, str]] = {}

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters that can be switched to."""
        return tuple(self._values)

    @property
    def swapped(self) -> set[str]:
        """Plain names of the weights that some adapter changes without factors."""
        return {name for values in self._values.values() for name in values}

    @property
    def set_aside(self) -> Mapping[str, Tensor]:
        """What the trained adapter changes without factors, while something else is on."""
        return {} if self.active == ADAPTER else self._values[ADAPTER]

    def parts(self, detector: nn.Module) -> set[str]:
        """Top-level parts of a detector that are not the base's alone, whatever is active.

        Args:
            detector: An injected detector.

        Returns:
            Such as ``{'decoder', 'bbox_head'}``.
        """
        self._look(detector)
        names = self.swapped.union(entry.name for entry in self._layers if entry.scalings)
        return {name.partition('.')[0] for name in names}

    # ------------------------------------------------------------------------------ what happened

    def adapters_changed(self) -> None:
        """Layers were put in or taken out, so that lists of them no longer hold."""
        self._places = {}

    def forget_base(self) -> None:
        """The base's values have to be asked for again."""
        self._base, self._asked = {}, set()

    def add(self, adapter: str, values: Mapping[str, Tensor]) -> None:
        """Another adapter has been put in.

        Args:
            adapter: Its name.
            values: What it changes without factors, by plain name.
        """
        self._values[adapter] = {n: v for n, v in values.items() if n != LABEL_EMBEDDING}
        self.adapters_changed()

    def remove(self, adapter: str) -> None:
        """An adapter has been taken out, or could not be put in.

        Args:
            adapter: Its name.
        """
        self._values.pop(adapter, None)
        self.adapters_changed()

    def remember(self, detector: nn.Module, changed: Iterable[str]) -> None:
        """Takes down what the trained adapter changes without factors, where it is on.

        Args:
            detector: An injected detector.
            changed: Plain names of what is no longer the base's.
        """
        if self.active != ADAPTER:
            return
        self._look(detector)
        names = sorted(n for n in changed if n != LABEL_EMBEDDING and n in self._places)
        now = self._tensors(names)
        kept = self._values[ADAPTER]
        fits = list(kept) == names and all(
            kept[n].dtype == t.dtype and kept[n].device == t.device for n, t in zip(names, now)
        )
        if fits:
            _copy(list(kept.values()), now)
        else:
            self._values[ADAPTER] = {name: t.clone() for name, t in zip(names, now)}

    # ----------------------------------------------------------------------------------- switching

    @torch.no_grad()
    def to(
        self, detector: nn.Module, adapter: Active, base: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        """Switches to an adapter or a combination.

        Args:
            detector: An injected detector.
            adapter: Names among :attr:`adapters`.
            base: Reads the base's weights, by plain name; called where they are needed.
        """
        self._look(detector)
        weights = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter)
        self._exchange(weights, base)
        for entry in self._layers:
            set_active(entry.layer, [name for name in weights if name in entry.scalings])
            enable(entry.layer, bool(weights))
            for name, weight in weights.items():
                if name in entry.scalings:
                    # Not PEFT's set_scale, which forgets rsLoRA's root up to 0.15.
                    entry.layer.scaling[name] = entry.scalings[name] * weight
        self.active = adapter if isinstance(adapter, str) else weights

    @contextmanager
    def off(self, detector: nn.Module, base: Callable[[], Mapping[str, Tensor]]) -> Iterator[None]:
        """Within, the detector is its base.

        Args:
            detector: An injected detector.
            base: As for :meth:`to`.

        Yields:
            Nothing.
        """
        self._look(detector)
        active = self.active
        weights = {active: 1.0} if isinstance(active, str) else dict(active)
        self._exchange({}, base)
        for entry in self._layers:
            enable(entry.layer, False)
        self.active = {}
        try:
            yield
        finally:
            for entry in self._layers:
                enable(entry.layer, bool(weights))
            self._exchange(weights, base)
            self.active = active

    @torch.no_grad()
    def _exchange(
        self, weights: Mapping[str, float], base: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        """Writes the values that belong to a combination into the detector."""
        names = sorted(self.swapped)
        now = dict(zip(names, self._tensors(names)))
        changes = {
            name: [
                (w, self._values[n][name]) for n, w in weights.items() if name in self._values[n]
            ]
            for name in names
        }
        new = {n: c[0][1] for n, c in changes.items() if len(c) == 1 and c[0][0] == 1}
        if len(new) < len(names):
            values = self._base_values(now, base)
            for name in names:
                if name not in new and name in values:  # the base's file may lack counters
                    value = values[name]
                    deltas = (
                        w * (changed.to(value.device) - value) for w, changed in changes[name]
                    )
                    new[name] = sum(deltas, start=value)
        _copy([now[name] for name in new], list(new.values()))
        # Autocast remembers casts of weights, and doesn't notice that they have changed since.
        torch.clear_autocast_cache()

    def _base_values(
        self, now: Mapping[str, Tensor], base: Callable[[], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The base's values of what is exchanged, where and as the detector has them."""
        if not self._asked >= now.keys():
            weights = base()
            self._base = {name: weights[name].to(t) for name, t in now.items() if name in weights}
            self._asked = set(now)
        for name, value in self._base.items():
            if name in now and value.device != now[name].device:
                self._base[name] = value.to(now[name].device)
        return self._base

    def _look(self, detector: nn.Module) -> None:
        """Finds layers and tensors again where they have changed."""
        if self._places:
            return
        self._places = {
            base_name(name): place
            for name, place in places(detector).items()
            if not is_factor(name)
        }
        known = {id(entry.layer): entry.scalings for entry in self._layers}
        self._layers = [
            _Layer(
                name,
                layer,
                {n: known.get(id(layer), {}).get(n, s) for n, s in layer.scaling.items()},
            )
            for name, layer in every_adapter_layer(detector)
        ]

    def _tensors(self, names: Iterable[str]) -> list[Tensor]:
        """Of the detector, as it holds them now: moving it to a device replaces its buffers."""
        found = (self._places[name] for name in names)
        return [getattr(module, key).detach() for module, key in found]


def _copy(into: list[Tensor], values: list[Tensor]) -> None:
    if into:
        torch._foreach_copy_(into, values)

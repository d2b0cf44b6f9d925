"""Names decide who answers: those that an adapter was taught go through it, all others to the base.

Whatever was trained and for however long, the base's answer for its own names stays the base's.
Published under other forms as MR-GDINO (Dong et al., 2024) and DitHub (Cappellino et al., 2025);
here the names that training has shown decide, which a checkpoint knows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Optional

from torch import nn

from mmdet_gdino_lora.checks.findings import tell
from mmdet_gdino_lora.checks.route import BASE, check_route
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import ADAPTER, IMAGE_TOWER, lora_state, set_adapter
from mmdet_gdino_lora.samples import Owner
from mmdet_gdino_lora.text import spoken
from mmdet_gdino_lora.text.caption import ClassName


class Route:
    """Decides which adapter answers for a class.

    Args:
        names: Adapter by class name, where the names that adapters were taught don't decide;
            ``'base'`` is none of them.
        adapters: Files of further adapters by name; they are loaded when they are first needed.
    """

    def __init__(
        self,
        names: Optional[Mapping[str, str]] = None,
        adapters: Optional[Mapping[str, str]] = None,
    ) -> None:
        self.names = {spoken(name): adapter for name, adapter in (names or {}).items()}
        self.adapters = dict(adapters or {})

    @classmethod
    def from_config(cls, settings: Any, has_adapters: bool) -> Optional[Route]:
        """Reads ``model.test_cfg.route``.

        Args:
            settings: True, or a dict of the constructor's arguments; None or False: no route.
            has_adapters: Whether the config sets ``model.lora``.

        Returns:
            The route, if there is one.

        Raises:
            ConfigError: It is nothing of that, or names a file that isn't there.
        """
        tell(check_route(settings, has_adapters))
        if settings is None or settings is False:
            return None
        return cls() if settings is True else cls(**settings)

    def applies(self, detector: nn.Module) -> bool:
        """Tells whether names decide: not while somebody has switched adapters by hand.

        Args:
            detector: An injected detector.
        """
        active = lora_state(detector).switch.active
        return active == ADAPTER or set(active) == {ADAPTER}

    def owners(self, detector: Any, names: Sequence[ClassName]) -> list[Owner]:
        """Says who answers for each class.

        Args:
            detector: An injected detector; adapters that it lacks are loaded.
            names: Class names or prompts.

        Returns:
            Per class the name of an adapter; None: the base.

        Raises:
            ConfigError: Two adapters were taught a name, the route names an adapter that isn't
                there, or an adapter's file doesn't say what it was taught.
        """
        switch = lora_state(detector).switch
        for name, source in self.adapters.items():
            if name not in switch.adapters:
                detector.load_adapter(source, name)
        self._check(detector)
        taught = {name: lora_state(detector).taught(name) or () for name in switch.adapters}
        return [self._owner(spoken(name), taught) for name in names]

    def _check(self, detector: nn.Module) -> None:
        state = lora_state(detector)
        there = state.switch.adapters
        for name, adapter in self.names.items():
            if adapter != BASE and adapter not in there:
                raise ConfigError(
                    f'model.test_cfg.route.names sends {name!r} to {adapter!r}, and no adapter of '
                    f'that name is loaded (there are {sorted(there)}, and {BASE!r}); put its file '
                    'into route.adapters'
                )
        for adapter in there:
            if state.taught(adapter) is None and adapter not in self.names.values():
                raise ConfigError(
                    f"model.test_cfg.route: the file of the adapter {adapter!r} doesn't say which "
                    'names it was taught, as those of earlier versions; say so: '
                    f"route=dict(names={{'cat': {adapter!r}}})"
                )

    def _owner(self, name: str, taught: Mapping[str, Any]) -> Owner:
        if name in self.names:
            return None if self.names[name] == BASE else self.names[name]
        teachers = [adapter for adapter, names in taught.items() if name in names]
        if len(teachers) > 1:
            raise ConfigError(
                f'model.test_cfg.route: {name!r} was taught to the adapters '
                f'{" and ".join(map(repr, teachers))}; choose: '
                f'route=dict(names={{{name!r}: {teachers[-1]!r}}})'
            )
        return teachers[0] if teachers else None


@contextmanager
def answering(detector: nn.Module, owner: Owner) -> Iterator[None]:
    """Within, an adapter is on, or none.

    Args:
        detector: An injected detector.
        owner: The adapter; None: the base. The detector's own has the weight that it had.

    Yields:
        Nothing.
    """
    active = lora_state(detector).switch.active
    wanted = active if owner == ADAPTER else owner
    if wanted == active:
        yield
        return
    set_adapter(detector, wanted)
    try:
        yield
    finally:
        set_adapter(detector, active)


def shares_image_tower(detector: nn.Module) -> bool:
    """Tells whether the base and all adapters have the same image features.

    Args:
        detector: An injected detector.
    """
    return lora_state(detector).switch.parts(detector).isdisjoint(IMAGE_TOWER)


def check_not_free_text(route: Optional[Route]) -> None:
    """Refuses a text in which noun phrases have to be found first, where names decide.

    Args:
        route: Of the detector.

    Raises:
        ConfigError: There is one.
    """
    if route is not None:
        raise ConfigError(
            'model.test_cfg.route gives every class name to who was taught it, and the text is a '
            "sentence; give class names (custom_entities=True, 'cat . dog'), or set "
            'model.test_cfg.route=False'
        )

"""The settings of ``model.test_cfg.route``: who answers for which names."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from mmdet_gdino_lora.checks.findings import Finding

BASE = 'base'
"""What ``route.names`` calls the base."""

_EXAMPLE = "route=dict(adapters={'cards': 'work_dirs/cards/epoch_12.pth'}, names={'ace': 'cards'})"


def check_route(route: Any, has_adapters: bool) -> Iterator[Finding]:
    """Checks a route as far as no detector is needed.

    Args:
        route: The config's ``model.test_cfg.route``.
        has_adapters: Whether the config sets ``model.lora``.

    Yields:
        What was found.
    """
    if route is None or route is False:
        return
    if not has_adapters:
        yield Finding(
            f'model.test_cfg.route={route!r}: names go to adapters or to the base under them, and '
            'this model has no adapters; set model.lora as it was trained',
            fatal=True,
        )
    if route is True:
        return
    if not isinstance(route, Mapping) or not set(route) <= {'adapters', 'names'}:
        yield Finding(
            f'model.test_cfg.route={route!r} is neither True nor a dict of the keys adapters and '
            f'names; write route=True, or {_EXAMPLE}',
            fatal=True,
        )
        return
    for key in ('adapters', 'names'):
        value = route.get(key) or {}
        if not isinstance(value, Mapping) or not all(
            isinstance(text, str) and text for item in value.items() for text in item
        ):
            yield Finding(
                f'model.test_cfg.route.{key}={value!r} is no dict of texts; write {_EXAMPLE}',
                fatal=True,
            )
            return
    for name, source in (route.get('adapters') or {}).items():
        if name == BASE:
            yield Finding(
                f'model.test_cfg.route.adapters has an adapter called {BASE!r}, as names that go '
                'to no adapter are; choose another name',
                fatal=True,
            )
        if not os.path.exists(source):
            yield Finding(
                f'model.test_cfg.route.adapters[{name!r}]={source!r}: no such file or folder; give '
                'a checkpoint of training, or the folder of an adapter',
                fatal=True,
            )

"""Arguments that no constructor takes: mmengine finds them deep inside, and names no config key."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Optional

from mmdet.registry import MODELS

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.nearest import nearest

PARTS = ('backbone', 'neck', 'language_model', 'bbox_head', 'data_preprocessor')
"""Parts of the detector that are built from their type and arguments."""

EXCHANGED = dict(BertModel='GroundingTextEncoder', GroundingDINOHead='GroundingDINOCriterionHead')
"""mmdet's parts that the detector exchanges for its own, which take more."""

_READS = r'\.pop\(|\.get\(|\[[^]]+\](?! = )'


def check_model(model: Mapping[str, Any]) -> Iterator[Finding]:
    """Checks that the model's types are there and take the arguments that the config gives.

    Args:
        model: The config's ``model``.

    Yields:
        What was found.
    """
    places: dict[str, Any] = {'model': model}
    places.update({f'model.{part}': model.get(part) for part in PARTS})
    for key, node in places.items():
        if not isinstance(node, Mapping) or not isinstance(node.get('type'), str):
            continue
        kind = node['type'].rpartition('.')[2]
        found = MODELS.get(EXCHANGED.get(kind, node['type']))
        if found is None:
            yield Finding(
                f'{key}.type={node["type"]!r}: no model of this name is registered'
                f'{_hint(kind, MODELS.module_dict)}; correct it, or import what registers it with '
                'custom_imports',
                fatal=True,
            )
        elif inspect.isclass(found):
            given = [name for name in node if name not in ('type', '_scope_')]
            yield from unknown_arguments(key, found, given)


def unknown_arguments(key: str, kind: type, given: Iterable[str]) -> Iterator[Finding]:
    """Finds arguments that a class does not take.

    Args:
        key: Where its config stands.
        kind: The class.
        given: Names of arguments.

    Yields:
        What was found.
    """
    known = _arguments(kind)
    for name in given:
        if known is not None and name not in known:
            yield Finding(
                f'{key}.{name}: {kind.__name__} has no such argument{_hint(name, known)}; correct '
                'the name or leave it out',
                fatal=True,
            )


def _arguments(kind: type) -> Optional[set[str]]:
    """All that a class takes, its bases' included where it hands on the rest; None: anything."""
    known: set[str] = set()
    for cls in kind.__mro__:
        init = cls.__dict__.get('__init__')
        if init is None:
            continue
        if not inspect.isfunction(init):
            return None
        parameters = inspect.signature(init).parameters.values()
        rest = [p.name for p in parameters if p.kind is p.VAR_KEYWORD]
        known.update(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
        if not rest:
            return known - {'self'}
        # What a class reads out of the rest by name isn't in any signature.
        if re.search(rf'{rest[0]}({_READS})', _source(init)):
            return None
    return None


def _source(function: Any) -> str:
    try:
        return inspect.getsource(function)
    except OSError:
        return ''


def _hint(word: str, known: Iterable[str]) -> str:
    near = nearest(word, known)
    return f' (did you mean {near!r}?)' if near else ''

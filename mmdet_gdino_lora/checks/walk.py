"""Finds data sets and metrics in a config, through wrappers and lists of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def datasets_of(key: str, node: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Finds the data sets in a dataloader's config.

    Args:
        key: Where it stands in the config, such as ``train_dataloader``.
        node: The dataloader's config, or a part of it.

    Yields:
        Of each data set that wraps no other: where it stands, and its config.
    """
    if isinstance(node, Mapping):
        inner = [name for name in ('dataset', 'datasets') if node.get(name)]
        if not inner and 'type' in node:
            yield key, node
        for name in inner:
            yield from datasets_of(f'{key}.{name}', node[name])
    elif isinstance(node, (list, tuple)):
        for index, part in enumerate(node):
            yield from datasets_of(f'{key}.{index}', part)


def metrics_of(key: str, node: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Finds the metrics in an evaluator's config.

    Args:
        key: Where it stands in the config, such as ``val_evaluator``.
        node: The evaluator's config, or a part of it.

    Yields:
        Of each metric, and of evaluators that hold some: where it stands, and its config.
    """
    if isinstance(node, Mapping):
        yield key, node
        yield from metrics_of(f'{key}.metrics', node.get('metrics'))
    elif isinstance(node, (list, tuple)):
        for index, part in enumerate(node):
            yield from metrics_of(f'{key}.{index}', part)

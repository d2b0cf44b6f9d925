"""What kept features depend on: those of another recipe are never read, but told and removed.

The recipe's digest is part of every file's name. What it holds in readable form lies beside them,
so that a run that no longer finds its features can say what is different.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.logging import MMLogger
from torch import nn

from mmdet_gdino_lora.checks.walk import datasets_of
from mmdet_gdino_lora.engine.atomic import write_whole
from mmdet_gdino_lora.lora.store.base import fingerprint
from mmdet_gdino_lora.lora.tensors import plain_tensors
from mmdet_gdino_lora.retain import BEHIND_ENCODER

FILE = 'recipe.json'

SAID = dict(
    base='another base',
    model='another model config',
    captions='other names',
    pipeline='another pipeline',
    precision='another precision',
)
"""What a recipe holds, and what is said where it differs."""

_BEHIND = {
    *BEHIND_ENCODER,
    'base_checkpoint',
    'check_adapters',
    'dn_cfg',
    'full_checkpoint',
    'lora',
    'num_queries',
    'retain',
    'test_cfg',
    'train_box_head',
    'train_cfg',
    'trainable',
}
"""Keys of the model's config that the encoder's outputs don't depend on, or by their weights."""


def recipe_of(
    detector: nn.Module, cfg: Mapping[str, Any], captions: Sequence[Any], dtype: str
) -> dict[str, str]:
    """Writes down what features depend on, beside the image and its view.

    Args:
        detector: In front of whose decoder nothing is trained.
        cfg: The run's config.
        captions: That images are encoded under, in order.
        dtype: That features are kept in.

    Returns:
        A digest for each of :data:`SAID`.
    """
    frozen = {
        name: tensor
        for name, tensor in plain_tensors(detector).items()
        if name.partition('.')[0] not in BEHIND_ENCODER
    }
    model = {k: v for k, v in (cfg.get('model') or {}).items() if k not in _BEHIND}
    loader = cfg.get('train_dataloader') or {}
    pipelines = [d.get('pipeline') for _, d in datasets_of('train_dataloader', loader)]
    wrapper = cfg.get('optim_wrapper') or {}
    parts = dict(
        base=fingerprint(frozen),
        model=model,
        captions=[(caption.text, caption.input_ids.tolist()) for caption in captions],
        pipeline=pipelines,
        precision=(dtype, wrapper.get('type'), wrapper.get('dtype')),
    )
    return {name: _digest(part) for name, part in parts.items()}


def digest_of(recipe: Mapping[str, str]) -> str:
    """Puts a recipe into one word.

    Args:
        recipe: Of :func:`recipe_of`.

    Returns:
        Its digest.
    """
    return _digest(sorted(recipe.items()))


def differences(folder: str, recipe: Mapping[str, str]) -> list[str]:
    """Compares a folder's features with those that a run wants.

    Args:
        folder: Of the features.
        recipe: The run's.

    Returns:
        What is different, in words; empty where the folder has none yet.
    """
    try:
        there = json.loads(Path(folder, FILE).read_text(encoding='utf-8'))
        return [said for name, said in SAID.items() if there[name] != recipe[name]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        return ['something unknown']


def take_over(folder: str, recipe: Mapping[str, str]) -> None:
    """Makes a folder one of a recipe's: removes and tells what is of another.

    Args:
        folder: Of the features; made where it is missing.
        recipe: The run's.
    """
    found = differences(folder, recipe)
    if found:
        MMLogger.get_current_instance().warning(
            '%s holds features of %s; they are removed and computed anew.',
            folder,
            ' and '.join(found),
        )
        for path in kept_files(folder):
            path.unlink(missing_ok=True)
    write_whole(os.path.join(folder, FILE), json.dumps(recipe, indent=1))


def kept_files(folder: str) -> Iterator[Path]:
    """Finds the files of features in a folder, and no others.

    Args:
        folder: Of the features.

    Yields:
        Their paths.
    """
    yield from Path(folder).glob('[0-9a-f][0-9a-f]/*.safetensors')


def _digest(part: Any) -> str:
    text = json.dumps(_sorted(part), default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _sorted(part: Any) -> Any:
    """Config's dicts in one order, whoever wrote them."""
    if isinstance(part, Mapping):
        return {str(key): _sorted(part[key]) for key in sorted(part, key=str)}
    if isinstance(part, Iterable) and not isinstance(part, str):
        return [_sorted(item) for item in part]
    return part

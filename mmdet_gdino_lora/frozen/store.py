"""A view's features in a file of its own: whole or not there, mapped into memory, never code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmdet_gdino_lora.engine.atomic import atomic
from mmdet_gdino_lora.errors import ConfigError

Shapes = tuple[tuple[int, int], ...]


class Encoding(NamedTuple):
    """The encoder's outputs for one view under one caption.

    Attributes:
        memory: Of the image, without padding, level by level, row by row [S, C].
        memory_text: Of the caption's tokens, without padding [T, C].
    """

    memory: Tensor
    memory_text: Tensor


@dataclasses.dataclass(frozen=True)
class View:
    """An augmented view of an image behind the encoder.

    Attributes:
        encodings: Under the captions that the run asks for, the data set's own first.
        shapes: Height and width of every level; S is the sum of their products.
    """

    encodings: tuple[Encoding, ...]
    shapes: Shapes

    def to(self, *args: Any, **kwargs: Any) -> View:
        """As a tensor's: the loader's samples are moved to the device with all that is in them.

        Args:
            *args: As for ``Tensor.to``.
            **kwargs: The same.

        Returns:
            A new view.
        """
        moved = (Encoding(*(t.to(*args, **kwargs) for t in e)) for e in self.encodings)
        return View(tuple(moved), self.shapes)


class Truth(NamedTuple):
    """What the pipeline packed beside the image.

    Attributes:
        bboxes: Absolute (x0, y0, x1, y1) in the view [N, 4].
        labels: int64 [N].
        metainfo: Of plain values.
    """

    bboxes: Tensor
    labels: Tensor
    metainfo: dict[str, Any]


class Entry(NamedTuple):
    """Where a view is kept, and of which image.

    Attributes:
        path: Of the file.
        stamp: Says what it is of: changes with the image's file and with its annotations.
        outdated: Whether the file is there, and of what has changed since.
    """

    path: str
    stamp: str
    outdated: bool = False


def entry_path(folder: str, *parts: Any) -> str:
    """Names the file of a view.

    Args:
        folder: Of all of them.
        *parts: What tells the view from every other one.

    Returns:
        A path in one of 256 folders.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
    return os.path.join(folder, digest[:2], f'{digest[2:]}.safetensors')


def read(entry: Entry) -> Optional[tuple[View, Truth]]:
    """Reads a view. Its features stay on disk until somebody looks at them.

    Args:
        entry: The view's.

    Returns:
        The view and its truth; None where there is none of this stamp.
    """
    try:
        with safe_open(entry.path, 'pt') as file:
            said = json.loads(file.metadata()['view'])
            if said['stamp'] != entry.stamp:
                return None
            encodings = tuple(
                Encoding(file.get_tensor(f'memory.{n}'), file.get_tensor(f'memory_text.{n}'))
                for n in range(said['encodings'])
            )
            truth = file.get_tensor('bboxes'), file.get_tensor('labels')
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError, ValueError, TypeError):  # no file of ours: made anew
        return None
    shapes = tuple((height, width) for height, width in said['shapes'])
    return View(encodings, shapes), Truth(*truth, metainfo=_from_json(said['metainfo']))


def write(entry: Entry, view: View, truth: Truth) -> None:
    """Writes a view.

    Args:
        entry: Its own.
        view: On the CPU, in the type that it is kept in.
        truth: On the CPU.

    Raises:
        OSError: The disk doesn't take it; nothing is left behind then.
    """
    tensors = {'bboxes': truth.bboxes, 'labels': truth.labels}
    for number, encoding in enumerate(view.encodings):
        tensors[f'memory.{number}'] = encoding.memory
        tensors[f'memory_text.{number}'] = encoding.memory_text
    said = dict(
        stamp=entry.stamp,
        shapes=view.shapes,
        encodings=len(view.encodings),
        metainfo={key: _to_json(key, value) for key, value in truth.metainfo.items()},
    )
    with atomic(entry.path) as partial:
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, partial, {'view': json.dumps(said)}
        )


def _to_json(key: str, value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        return [_to_json(key, item) for item in value]
    if isinstance(value, np.ndarray):
        return dict(array=value.tolist(), dtype=str(value.dtype))
    raise ConfigError(
        f'FrozenFeaturesHook: PackDetInputs.meta_keys has {key!r}, whose value is of type '
        f'{type(value).__name__} and can not be kept beside features; leave it out of meta_keys'
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    if isinstance(value, Mapping):
        if value.keys() == {'array', 'dtype'}:
            return np.array(value['array'], dtype=value['dtype'])
        return {key: _from_json(item) for key, item in value.items()}
    return value


def rounded(encoding: Encoding, dtype: torch.dtype) -> Encoding:
    """Brings features into the type that they are kept in.

    Args:
        encoding: Of any type.
        dtype: That type.

    Returns:
        On the same device.
    """
    return Encoding(*(tensor.to(dtype) for tensor in encoding))

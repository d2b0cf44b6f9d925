"""Reading checkpoints and JSON that somebody else may have written."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from typing import Any, Callable, Optional, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.sizes import check_archive, check_tensors
from mmdet_gdino_lora.files.types import mmengine_types

MapLocation = Optional[Union[str, torch.device, dict[str, str], Callable]]

# The index of a model in a hundred shards has some 100 kB.
_BYTES_OF_JSON = 64 * 2**20


def read_file(path: str, map_location: MapLocation = 'cpu') -> dict[str, Any]:
    """Reads what a checkpoint file holds, without running anything in it.

    Args:
        path: ``.safetensors`` or a file of ``torch.save``.
        map_location: As for ``torch.load``; ``.safetensors`` is read to the CPU.

    Returns:
        Its top-level dict.

    Raises:
        ConfigError: If the file is missing, truncated or damaged, promises more than it has, or
            holds other things than plain weights and mmengine's own.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        raise ConfigError(f'{path}: there is no such file.')
    try:
        if path.endswith('.safetensors'):
            return load_file(path)
        check_archive(path)
        with mmengine_types():
            content = torch.load(path, map_location=map_location, weights_only=True)
        check_tensors(path, content)
    except ConfigError:
        raise
    except (SafetensorError, RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f'{path} cannot be read ({_first_line(error) or "empty file"}):'
            ' it is truncated or no checkpoint; copy or download it again.'
        ) from error
    # A crafted or damaged pickle ends in whatever the unpickler stumbles over.
    except Exception as error:
        raise ConfigError(
            f'{path} is damaged or holds more than weights, and is not read because that could run '
            f'code ({_reason(error)}); use another copy, or a .safetensors file.'
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f'{path} holds a {type(content).__name__}, not a dict of weights.')
    return content


def read_json(path: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        path: Of a file.

    Returns:
        It.

    Raises:
        ConfigError: If the file is too large for what it is, no JSON, or no object.
    """
    try:
        size = os.path.getsize(path)
        if size > _BYTES_OF_JSON:
            raise ConfigError(
                f'{path} has {size:,} bytes, which no such file needs: it is no description of '
                'weights; use another copy.'
            )
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
    except ConfigError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(
            f'{path} cannot be read ({_first_line(error)}): it is truncated or no JSON; copy or '
            'download it again.'
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f'{path} holds a {type(content).__name__}, not an object of names.')
    return content


def shards_of(index: str) -> list[str]:
    """Lists the files that an index of shards names.

    Args:
        index: A ``.index.json`` of transformers.

    Returns:
        Their paths, all inside the index's folder.

    Raises:
        ConfigError: If the index can't be read, or a shard lies outside its folder.
    """
    shards = read_json(index).get('weight_map')
    if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
        raise ConfigError(f'{index} has no weight_map from names to files; use another copy.')
    for name in sorted(set(shards.values())):
        inside = os.path.normpath(name)
        if os.path.isabs(inside) or inside.split(os.sep)[0] == os.pardir or '\\' in name:
            raise ConfigError(
                f'{index}: weight_map names {name!r}, which lies outside its folder; put the file '
                'beside the index and correct its name there.'
            )
    return [os.path.join(os.path.dirname(index), name) for name in sorted(set(shards.values()))]


def _reason(error: Exception) -> str:
    """What the unpickler stumbled over; torch tells it behind advice to read the file anyway."""
    if not isinstance(error, pickle.UnpicklingError):
        return f'{type(error).__name__}: {_first_line(error)}'
    said = ' '.join(str(error).split())
    refused = re.search(r'GLOBAL (\S+)', said)
    if refused:
        return f'unsupported: {refused[1]}'
    said = said.rpartition('WeightsUnpickler error: ')[2].partition(' Check the documentation')[0]
    return said.partition('. ')[0].rstrip('.')


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ''

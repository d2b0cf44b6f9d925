"""mmengine's own loading, through this project's: ``load_from``, ``--resume``, ``init_cfg``."""

from __future__ import annotations

import functools
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Callable

from mmengine.runner import CheckpointLoader

from mmdet_gdino_lora.files.config_text import check_config_texts
from mmdet_gdino_lora.files.download import fetch_url
from mmdet_gdino_lora.files.read import MapLocation, read_file
from mmdet_gdino_lora.files.types import mmengine_types

SOURCE = 'mmdet_gdino_lora_file'
"""Key in a state dict's metadata: the path or URL that it was read from."""


def register_loaders() -> None:
    """Puts this project's reading of files in the place of mmengine's, for local files and URLs.

    Other schemes (``torchvision://``, ``s3://`` and the like) keep mmengine's loaders, and each
    runs where torch reads weights and mmengine's few types only, whatever the environment says.
    """
    register = CheckpointLoader.register_scheme
    register('', load_from_local, force=True)
    register(('http://', 'https://'), load_from_http, force=True)
    for prefix, loader in list(CheckpointLoader._schemes.items()):
        if loader not in (load_from_local, load_from_http) and not hasattr(loader, '__wrapped__'):
            register(prefix, _weights_only(loader), force=True)


# mmengine's log shows the names without their first ten letters.
def load_from_local(filename: str, map_location: MapLocation = None) -> dict[str, Any]:
    """Reads a checkpoint for mmengine.

    Args:
        filename: Path of a file.
        map_location: As for ``torch.load``.

    Returns:
        What it holds.

    Raises:
        ConfigError: As :func:`~.read.read_file`, and if a config inside it is a program.
    """
    content = read_file(filename, map_location)
    check_config_texts(filename, content)
    return _with_source(content, filename)


def load_from_http(filename: str, map_location: MapLocation = None, **_: Any) -> dict[str, Any]:
    """Fetches a checkpoint for mmengine and reads it.

    Args:
        filename: URL of a file.
        map_location: As for ``torch.load``.

    Returns:
        What it holds.

    Raises:
        ConfigError: As :func:`load_from_local` and :func:`~.download.fetch_url`.
    """
    return _with_source(load_from_local(fetch_url(filename, 'load_from'), map_location), filename)


def _with_source(content: dict[str, Any], filename: str) -> dict[str, Any]:
    """Notes where weights come from in their metadata, which goes with them into the model."""
    weights = content.get('state_dict')
    if isinstance(weights, dict):
        noted = OrderedDict(weights)
        metadata = OrderedDict(getattr(weights, '_metadata', {}))
        metadata[''] = {**metadata.get('', {}), SOURCE: filename}
        noted._metadata = metadata  # type: ignore[attr-defined]
        content['state_dict'] = noted
    return content


def _weights_only(loader: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(loader)
    def load(filename: str, *args: Any, **kwargs: Any) -> Any:
        with mmengine_types(), _forced():
            content = loader(filename, *args, **kwargs)
        if isinstance(content, dict):
            check_config_texts(filename, content)
        return content

    return load


@contextmanager
def _forced() -> Iterator[None]:
    """Within, ``torch.load`` reads weights only, also where its caller doesn't ask for it."""
    names = ('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', 'TORCH_FORCE_WEIGHTS_ONLY_LOAD')
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[1]] = '1'
    try:
        yield
    finally:
        del os.environ[names[1]]
        os.environ.update({name: value for name, value in before.items() if value is not None})

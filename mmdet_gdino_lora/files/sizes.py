"""Files that promise more than they hold, found before memory is taken for it."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor, strided

from mmdet_gdino_lora.errors import ConfigError

_ZIP = b'PK\x03\x04'


def check_archive(path: str) -> None:
    """Compares what the directory of a ``torch.save`` file promises with the file's size.

    torch stores what it saves as it is. A directory that promises more was made by somebody else,
    compressed or with one place named many times over, and would be unpacked into memory.

    Args:
        path: Of a file that may be such an archive, or anything else.

    Raises:
        ConfigError: If it promises more bytes than it has.
    """
    with open(path, 'rb') as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            promised = sum(record.file_size for record in archive.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # truncated, which torch says as well
    if promised > size:
        raise ConfigError(
            f'{path} has {size:,} bytes and promises {promised:,} in its directory, which torch '
            'never writes: it is crafted or compressed; use a file as torch.save wrote it, or a '
            '.safetensors file.'
        )


def check_tensors(path: str, content: Any) -> None:
    """Compares the tensors that were read with the numbers that the file holds for them.

    Args:
        path: Of the file.
        content: What was read: tensors in dicts and lists.

    Raises:
        ConfigError: If tensors have no numbers, or repeat few of them beyond the file's size.
    """
    size, excess = os.path.getsize(path), 0
    seen: set[int] = set()
    waiting = [('', content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, (Mapping, list, tuple)):
            if id(value) not in seen:
                seen.add(id(value))
                items = value.items() if isinstance(value, Mapping) else enumerate(value)
                waiting += [(f'{name}.{key}' if name else str(key), item) for key, item in items]
        elif isinstance(value, Tensor) and value.layout == strided:
            bytes_shown = value.numel() * value.element_size()
            excess += max(0, bytes_shown - value.untyped_storage().nbytes())
            if value.is_meta or excess > size:
                raise ConfigError(
                    f'{path}: {name} has the shape {tuple(value.shape)}, and the file of {size:,} '
                    'bytes does not hold as many numbers: it is crafted or damaged; use another '
                    'copy.'
                )

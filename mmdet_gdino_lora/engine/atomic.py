"""Files that are whole or not there at all, whenever the process is killed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Union

from mmengine.fileio import LocalBackend, register_backend


@contextmanager
def atomic(path: str) -> Iterator[str]:
    """Writes a file beside its final name and moves it there when it is complete and on disk.

    Args:
        path: The final name; its folder is created where missing.

    Yields:
        The name to write to.
    """
    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    partial = os.path.join(folder, f'.{name}.{os.getpid()}.partial')
    try:
        with open(partial, 'wb') as file:
            mode = os.fstat(file.fileno()).st_mode  # safetensors would leave it to the owner alone
        yield partial
        os.chmod(partial, mode)
        with open(partial, 'rb+') as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: str, content: Union[str, bytes]) -> None:
    """Writes a file, whole or not at all.

    Args:
        path: The final name; its folder is created where missing.
        content: Of it; text is encoded as UTF-8.
    """
    with atomic(path) as partial, open(partial, 'wb') as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_partial(folder: str) -> None:
    """Removes what processes that were killed while they wrote have left behind.

    Args:
        folder: Of a run that no other process writes to now.
    """
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith('.') and name.endswith('.partial'):
            os.remove(os.path.join(folder, name))


@register_backend('atomic')
class AtomicBackend(LocalBackend):
    """mmengine's local files, written by :func:`atomic`.

    Chosen in a config by ``backend_args=dict(backend='atomic')``.
    """

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Writes bytes.

        Args:
            obj: What to write.
            filepath: Where.
        """
        with atomic(str(filepath)) as partial, open(partial, 'wb') as file:
            file.write(obj)

    def put_text(self, obj: str, filepath: Union[str, Path], encoding: str = 'utf-8') -> None:
        """Writes text.

        Args:
            obj: What to write.
            filepath: Where.
            encoding: Of the text.
        """
        self.put(obj.encode(encoding), filepath)

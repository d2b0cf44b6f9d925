"""A folder's photos, and what the config's test pipeline makes of them, in batches."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from typing import Any, Callable, Union

from torch.utils.data import Dataset

from mmdet_gdino_lora.checks.images import ENDINGS, look
from mmdet_gdino_lora.checks.words import contents
from mmdet_gdino_lora.engine.unreadable import can_be_read
from mmdet_gdino_lora.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Photo:
    """A file, as it was when it was looked up.

    Attributes:
        name: Relative to the folder, with slashes.
        size: In bytes; -1 where there is no such file.
        changed: When it was written last, in ns.
    """

    name: str
    size: int
    changed: int


def find_photos(folder: str, left_out: str) -> list[Photo]:
    """Finds the photos of a folder and of the folders in it, but for hidden ones.

    Args:
        folder: Where they are.
        left_out: A folder that is not looked into: pictures with boxes drawn are no photos.

    Returns:
        By name.

    Raises:
        ConfigError: There are none.
    """
    names = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [
            name
            for name in folders
            if not name.startswith('.')
            and os.path.abspath(os.path.join(parent, name)) != os.path.abspath(left_out)
        ]
        inside = os.path.relpath(parent, folder)
        names += [
            os.path.normpath(os.path.join(inside, name)).replace(os.sep, '/')
            for name in files
            if name.lower().endswith(ENDINGS) and not name.startswith('.')
        ]
    if not names:
        raise ConfigError(
            f'PHOTOS {folder!r} holds {contents(folder)} and no photos; name a folder with files '
            f'that end in {", ".join(ENDINGS)}'
        )
    return photos_of(folder, sorted(names))


def photos_of(folder: str, names: Iterable[str]) -> list[Photo]:
    """Looks photos up by name.

    Args:
        folder: Where they are.
        names: Relative to it.

    Returns:
        In the order of the names, each once.
    """
    return [_photo(folder, name) for name in dict.fromkeys(names)]


def _photo(folder: str, name: str) -> Photo:
    try:
        stat = os.stat(os.path.join(folder, name))
    except OSError:
        return Photo(name, -1, 0)
    return Photo(name, stat.st_size, stat.st_mtime_ns)


class LoadedBatches(Dataset):
    """Batches of photos, loaded.

    An item has for each photo what the pipeline makes of it, or a string: why it can't be read.

    Args:
        folder: Where the photos are.
        batches: Of photos.
        pipeline: The config's, for one image.
        names: Class names, which go into the caption.
    """

    def __init__(
        self,
        folder: str,
        batches: Sequence[Sequence[Photo]],
        pipeline: Callable[[dict], Any],
        names: Sequence[str],
    ) -> None:
        self._folder, self._batches = folder, batches
        self._pipeline, self._names = pipeline, tuple(names)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[Union[dict, str]]:
        return [self._load(photo.name) for photo in self._batches[index]]

    def _load(self, name: str) -> Union[dict, str]:
        path = os.path.join(self._folder, name)
        broken = look(path).broken
        if broken:
            return broken
        image = dict(img_path=path, img_id=0, text=self._names, custom_entities=True)
        try:
            return self._pipeline(image)
        except Exception:
            # Whatever the decoder raised; an error of the pipeline's own is a defect of the config.
            if can_be_read(path):
                raise
            return 'is damaged or no image'

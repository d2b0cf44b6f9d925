"""The files of a folder of photos, and which image a file of labels belongs to."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Optional

from mmdet_gdino_lora.checks.images import ENDINGS
from mmdet_gdino_lora.checks.words import contents
from mmdet_gdino_lora.errors import ConfigError

#: Words in the names of folders and files, and the split that they mean.
_SPLITS = dict(
    train='train', training='train', val='val', valid='val', validation='val', test='test',
    testing='test',
)  # fmt: skip


class Folder:
    """All files below a folder but hidden ones, links followed.

    Args:
        root: Path of the folder.

    Raises:
        ConfigError: There is no such folder, or no image in it.
    """

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise ConfigError(
                f'{str(root)!r}: no such folder; give the folder that holds the photos and their '
                'labels'
            )
        self.root = root.absolute()
        self.files = sorted(self._walk())
        self.images = self.ending(*ENDINGS)
        if not self.images:
            raise ConfigError(
                f'{str(root)!r} holds no images ({", ".join(ENDINGS)}) but {contents(str(root))}; '
                'give the folder that holds the photos and their labels, or save them as one of '
                'these'
            )
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for path in self.images:
            self._by_stem[path.stem].append(path)
            self._by_name[path.name].append(path)

    def _walk(self) -> Iterable[Path]:
        seen = set()
        for place, folders, files in os.walk(self.root, followlinks=True):
            real = os.path.realpath(place)
            folders[:] = [f for f in folders if not f.startswith(('.', '__MACOSX'))]
            if real in seen:  # a link into its own folder
                folders.clear()
                continue
            seen.add(real)
            yield from (Path(place, name) for name in files if not name.startswith('.'))

    def ending(self, *endings: str) -> list[Path]:
        """The files of some endings, in any case."""
        return [path for path in self.files if path.suffix.lower() in endings]

    def image_of(self, labels: Path, name: str = '') -> Optional[Path]:
        """Finds the image of a file of labels: that of its name without ending.

        Args:
            labels: Path of the file.
            name: What the labels call the image, where they do.

        Returns:
            Of several that one which is called so, or whose folders are called like the labels';
            else None.

        Raises:
            ConfigError: It could be any of several.
        """
        found = self._by_stem.get(labels.stem) or self._by_name.get(name, [])
        called = [path for path in found if path.name == name]
        return self.nearest(labels, called or found)

    def listed(self, labels: Path, name: str) -> Optional[Path]:
        """Finds an image that a file of labels lists by name or path.

        Args:
            labels: Path of the file that lists it.
            name: With folders or without.

        Returns:
            The image; None if there is none.

        Raises:
            ConfigError: It could be any of several.
        """
        for place in (labels.parent, self.root):
            path = Path(os.path.normpath(place / name))
            if path in self._by_name.get(path.name, ()):
                return path
        words = re.split(r'[\\/]', name)
        found = self._by_name.get(words[-1], [])
        ends = [path for path in found if path.parts[-len(words) :] == tuple(words)]
        return self.nearest(labels, ends or found)

    def nearest(self, labels: Path, found: Sequence[Path]) -> Optional[Path]:
        """Of several files, that whose folders are called the most like another's.

        Args:
            labels: The other file.
            found: Files.

        Returns:
            One of them; None if there is none.

        Raises:
            ConfigError: Several are alike in that.
        """
        if len(found) < 2:
            return found[0] if found else None
        here = [path for path in found if path.parent == labels.parent]
        likeness = [(self._likeness(labels, path), _is_among_images(path)) for path in found]
        best = here or [path for path, like in zip(found, likeness) if like == max(likeness)]
        if len(best) > 1:
            raise ConfigError(
                f'{str(labels)!r} could be of {str(best[0].relative_to(self.root))!r} or of '
                f'{str(best[1].relative_to(self.root))!r}; give every photo a name of its own, or '
                'take folders that are copies out'
            )
        return best[0]

    def _likeness(self, labels: Path, path: Path) -> int:
        """Names of folders that both are in, and the split, which a list has in its own name."""
        words = set(labels.relative_to(self.root).parts[:-1])
        split = self.split_of(path)
        return len(words.intersection(path.relative_to(self.root).parts[:-1])) + (
            split is not None and split == self.split_of(labels, named=True)
        )

    def split_of(self, path: Path, named: bool = False) -> Optional[str]:
        """The split that a file's folders, the innermost first, are called by.

        Args:
            path: Of the file.
            named: Whether its own name counts, too: a list's, not a photo's.

        Returns:
            ``'train'``, ``'val'``, ``'test'`` or None.
        """
        parts = path.relative_to(self.root).parts
        for part in reversed(parts if named else parts[:-1]):
            for word in re.split('[^a-z]+', part.lower()):
                if word in _SPLITS:
                    return _SPLITS[word]
        return None


def _is_among_images(path: Path) -> bool:
    """Whether a folder is called so: beside it may lie masks of the same names."""
    return any(part.lower() in ('images', 'jpegimages') for part in path.parts[:-1])

"""What every format's reader hands on: photos, their boxes, and what a person should be told."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional

from mmdet_gdino_lora.checks.images import look


@dataclasses.dataclass
class Box:
    """One labelled object.

    Attributes:
        name: Its class.
        bbox: x, y, width, height in pixels, as the labels have it; it may be wrong.
        crowd: Whether it is neither to be learned nor to be missed: COCO's crowds, VOC's difficult.
        entry: What a COCO file says of it besides.
    """

    name: str
    bbox: Any
    crowd: bool = False
    entry: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Photo:
    """One image and its labels.

    Attributes:
        path: Of the image file, which may be missing.
        size: Width and height in pixels, as the labels have it, or else as the image is shown.
        boxes: Its objects; empty where somebody said that it shows none.
        split: ``'train'``, ``'val'``, ``'test'``, or None where nobody said.
        entry: What a COCO file says of it.
    """

    path: Path
    size: tuple[Any, Any]
    boxes: list[Box] = dataclasses.field(default_factory=list)
    split: Optional[str] = None
    entry: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Labelled:
    """A folder's photos.

    Attributes:
        root: The folder.
        format: Name of the format for a person.
        photos: Those that have labels, sorted by path.
        names: Class names in the order of the labels' own numbers, or sorted where they have none.
        ids: Category ids of a COCO file by name; empty where it has none or they contradict.
        told: Sentences on what was left out or read otherwise.
    """

    root: Path
    format: str
    photos: list[Photo]
    names: list[str]
    ids: dict[str, Any] = dataclasses.field(default_factory=dict)
    told: list[str] = dataclasses.field(default_factory=list)

    def split(self, name: str) -> list[Photo]:
        """The photos of a split.

        Args:
            name: ``'train'`` has those that nobody put anywhere, too.
        """
        return [photo for photo in self.photos if (photo.split or 'train') == name]

    def file_name(self, photo: Photo) -> str:
        """A photo's path below the folder, with slashes."""
        return photo.path.relative_to(self.root).as_posix()


def count_boxes(photos: list[Photo]) -> Counter[str]:
    """Boxes by class name."""
    return Counter(box.name for photo in photos for box in photo.boxes)


def shown_size(path: Path) -> Optional[tuple[int, int]]:
    """Width and height of an image as it is shown, and as OpenCV loads it.

    Args:
        path: Of the image.

    Returns:
        Pixels; None for a file that is no image.
    """
    seen = look(str(path))
    return seen.size[::-1] if seen.size and seen.turned else seen.size


def listed_size(entry: Mapping[str, Any], path: Path) -> tuple[Any, Any]:
    """Width and height as an entry has them, or else the image.

    Args:
        entry: Of a json, with ``width`` and ``height`` where it is right.
        path: Of the image.

    Returns:
        Pixels; what the entry has, None included, where the image can't be read either.
    """
    width, height = entry.get('width'), entry.get('height')
    if all(isinstance(side, (int, float)) and side > 0 for side in (width, height)):
        return width, height
    return shown_size(path) or (width, height)


def some_of(paths: list[Path], root: Path) -> str:
    """Names the first of some files.

    Args:
        paths: At least one.
        root: The folder that they lie in.

    Returns:
        Such as ``'a/1.jpg' and 3 more``.
    """
    more = f' and {len(paths) - 1} more' if len(paths) > 1 else ''
    return f'{str(paths[0].relative_to(root))!r}{more}'


def numbered(photos: list[Photo]) -> Iterator[tuple[Any, Photo]]:
    """Gives every photo an id: the COCO file's where these are all there and differ.

    Args:
        photos: Of one split.

    Yields:
        Id and photo.
    """
    ids = [photo.entry.get('id') for photo in photos]
    usable = all(type(id_) in (int, str) for id_ in ids) and len(set(ids)) == len(ids)
    yield from zip(ids if usable else range(1, len(ids) + 1), photos)

"""Pascal VOC: an xml for each photo, beside it or in a folder of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Optional
from xml.etree import ElementTree

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.formats.folder import Folder
from mmdet_gdino_lora.formats.photos import Box, Labelled, Photo, shown_size, some_of

NAME = 'Pascal VOC'


def find(folder: Folder) -> list[Path]:
    """The folder's annotations.

    Args:
        folder: Of photos.

    Returns:
        Paths of xml files that begin as VOC's do.
    """
    return [path for path in folder.ending('.xml') if b'<annotation' in path.read_bytes()[:2000]]


def read(folder: Folder, labels: list[Path]) -> Labelled:
    """Reads annotations. Corners are taken as they stand there.

    Args:
        folder: Of photos.
        labels: What :func:`find` found.

    Returns:
        The photos that have an xml.

    Raises:
        ConfigError: An xml is damaged, or a box has no name or corners.
    """
    lists = _lists(folder)
    photos: dict[Path, Photo] = {}
    without_image, without_size = [], []
    difficult = 0
    for path in labels:
        root = _parsed(path)
        image = folder.image_of(path, (root.findtext('filename') or '').strip())
        if image is None:
            without_image.append(path)
            continue
        if image in photos:
            raise ConfigError(
                f'{str(path)!r} is a second annotation of {str(image)!r}; take one of them out'
            )
        size = _size(root) or shown_size(image)
        if size is None:
            without_size.append(image)
            continue
        boxes = [_box(path, entry) for entry in root.findall('object')]
        difficult += sum(box.crowd for box in boxes)
        split = lists.get(path.stem) or folder.split_of(image) or folder.split_of(path)
        photos[image] = Photo(image, size, boxes, split)
    told = []
    if without_image:
        told.append(
            f'{len(without_image)} xml files have no photo of their name and are left out: '
            f'{some_of(without_image, folder.root)}'
        )
    if without_size:
        told.append(
            f'{len(without_size)} photos can not be read and are left out: '
            f'{some_of(without_size, folder.root)}'
        )
    if difficult:
        told.append(
            f'{difficult} boxes are marked difficult: they are neither trained from nor counted as '
            'missed'
        )
    names = sorted({box.name for photo in photos.values() for box in photo.boxes})
    return Labelled(folder.root, NAME, [photos[p] for p in sorted(photos)], names, told=told)


def _parsed(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ConfigError(
            f'{str(path)!r} is no xml that can be read ({error}); export it anew, or take it out'
        ) from error


def _size(root: ElementTree.Element) -> Optional[tuple[int, int]]:
    """The size in the xml; labelImg once wrote 0 x 0."""
    try:
        width, height = (int(float(root.findtext(f'size/{k}') or 0)) for k in ('width', 'height'))
    except ValueError:
        return None
    return (width, height) if width > 0 and height > 0 else None


def _box(path: Path, entry: ElementTree.Element) -> Box:
    name = (entry.findtext('name') or '').strip()
    try:
        corners = [
            float(entry.findtext(f'bndbox/{key}') or '') for key in ('xmin', 'ymin', 'xmax', 'ymax')
        ]
    except ValueError:
        corners = []
    if not name:
        raise ConfigError(
            f'{str(path)!r} holds an object without a name, of which the caption is made; name it, '
            'or take it out'
        )
    if not corners:
        raise ConfigError(
            f'{str(path)!r} holds an object {name!r} without a bndbox of four numbers (xmin, ymin, '
            'xmax, ymax); export boxes, or take it out'
        )
    left, top, right, bottom = corners
    difficult = (entry.findtext('difficult') or '0').strip() == '1'
    return Box(name, [left, top, right - left, bottom - top], crowd=difficult)


def _lists(folder: Folder) -> dict[str, str]:
    """Splits by the photo's name without ending, of the devkit's ImageSets/Main/{train,val}.txt."""
    result = {}
    for path in folder.ending('.txt'):
        if 'ImageSets' in path.parts and path.stem in ('train', 'val', 'test'):
            for line in path.read_text(encoding='utf-8').splitlines():
                if line.strip():
                    result[line.split()[0]] = path.stem
    return result

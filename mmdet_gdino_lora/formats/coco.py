"""COCO's json: one file for each split, or Roboflow's `_annotations.coco.json` in each folder."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet_gdino_lora.checks.coco_file import CocoFile, read_coco, uncollected
from mmdet_gdino_lora.checks.words import some
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.formats.folder import Folder
from mmdet_gdino_lora.formats.photos import Box, Labelled, Photo, listed_size

NAME = 'COCO'


def find(folder: Folder) -> list[Path]:
    """The folder's annotation files.

    Args:
        folder: Of photos.

    Returns:
        Paths of json files that speak of images and categories.
    """
    found = []
    for path in folder.ending('.json'):
        content = path.read_bytes()
        if b'"images"' in content and b'"categories"' in content:
            found.append(path)
    return found


def read(folder: Folder, labels: list[Path]) -> Labelled:
    """Reads annotation files; ids, crowds and whatever else they say are kept.

    Args:
        folder: Of photos.
        labels: What :func:`find` found.

    Returns:
        The photos that a file lists, also those that are missing.

    Raises:
        ConfigError: A file is no COCO file, or two files list the same photo.
    """
    with uncollected():
        files = [read_coco(str(path)) for path in labels]
    told: list[str] = []
    boxed = [coco for coco in files if coco.annotations]
    without = [coco.path for coco in files if not coco.annotations]
    if boxed and without:
        told.append(f'files without annotations are left out: {some(without)}')
    photos: dict[Path, Photo] = {}
    listed_by: dict[Path, str] = {}
    for coco in boxed or files:
        for photo in _photos(folder, coco, told):
            if photo.path in photos:
                raise ConfigError(
                    f'{listed_by[photo.path]!r} and {coco.path!r} both list {str(photo.path)!r}; '
                    'leave one of the two files in the folder'
                )
            photos[photo.path] = photo
            listed_by[photo.path] = coco.path
    names = list(dict.fromkeys(name for coco in boxed or files for name in coco.names))
    ids = _ids(boxed or files)
    if not ids:
        told.append('category ids contradict each other between files or names: renumbered from 1')
    return Labelled(folder.root, NAME, list(photos.values()), names, ids, told)


def _photos(folder: Folder, coco: CocoFile, told: list[str]) -> list[Photo]:
    labels = Path(coco.path)
    split = folder.split_of(labels, named=True)
    names = {category.get('id'): category['name'] for category in coco.categories}
    entries: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    _check_ids(coco)
    strange = 0
    for entry in coco.annotations:
        if entry.get('category_id') in names:
            entries[entry.get('image_id')].append(entry)
        else:
            strange += 1
    if strange:
        told.append(
            f'{strange} annotations of {coco.path} have a category_id that it does not list, and '
            'are left out'
        )
    photos = []
    for image in coco.images:
        name = image.get('file_name')
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f'{coco.path} lists an image without file_name ({image}); write the name of its '
                'photo there, or take it out'
            )
        path = folder.listed(labels, name) or folder.root / name.lstrip('/')
        size = listed_size(image, path)
        boxes = [
            Box(names[entry['category_id']], entry.get('bbox'), bool(entry.get('iscrowd')), entry)
            for entry in entries.pop(image.get('id'), ())
        ]
        photos.append(Photo(path, size, boxes, split, image))
    lost = sum(map(len, entries.values()))
    if lost:
        told.append(
            f'{lost} annotations of {coco.path} are of images that it does not list, and are left '
            'out'
        )
    return photos


def _check_ids(coco: CocoFile) -> None:
    counts = Counter(image.get('id') for image in coco.images)
    twice = [id_ for id_, count in counts.items() if count > 1]
    if twice:
        raise ConfigError(
            f'{coco.path}: {some(twice)} is the id of several images, so that nobody knows whose '
            'the boxes are; give every image an id of its own'
        )


def _ids(files: Sequence[CocoFile]) -> dict[str, Any]:
    """Ids by name, if a name has one id and an id one name in all of the files; else none."""
    pairs = {(c['name'], c.get('id')) for coco in files for c in coco.categories}
    names, ids = {name for name, _ in pairs}, {id_ for _, id_ in pairs}
    return dict(pairs) if len(pairs) == len(names) == len(ids) else {}

"""Reads a COCO file once for all checks, and says what in it mmdet could not even load."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, Callable

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.words import contents, share
from mmdet_gdino_lora.errors import ConfigError

#: What folders of other formats hold, and whose they are.
_FORMATS = {
    '.xml': "Pascal VOC's annotations",
    '.txt': "YOLO's labels",
    '.jpg': 'images',
    '.jpeg': 'images',
    '.png': 'images',
}
_CONVERT = (
    'convert the annotations to one json in COCO format (images, annotations with bbox=[x, y, '
    'width, height] in pixels, categories)'
)


@dataclasses.dataclass(frozen=True)
class CocoFile:
    """The content of an annotation file.

    Attributes:
        path: Of the file.
        where: The config key and the path, as sentences begin.
        images: The file's list.
        annotations: The file's list.
        categories: The file's list.
    """

    path: str
    where: str
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]

    @property
    def names(self) -> list[str]:
        """Category names in the file's order."""
        return [category['name'] for category in self.categories]


def need_no_folder(key: str, path: str) -> None:
    """Refuses a folder where an annotation file is wanted.

    Args:
        key: Where the path stands in the config.
        path: Of what should be a file.

    Raises:
        ConfigError: It is a folder.
    """
    if not os.path.isdir(path):
        return
    held = contents(path)
    format_ = next((f', {name},' for end, name in _FORMATS.items() if f' {end} ' in held), '')
    raise ConfigError(
        f'{key}={path!r} is a folder of {held}{format_} where a file is wanted; {_CONVERT} and set '
        f'{key} to that file'
    )


def read_coco(path: str, where: str = '') -> CocoFile:
    """Reads an annotation file.

    Args:
        path: Of the json.
        where: As sentences on the file begin; the path by default.

    Returns:
        Its lists; of images and annotations an empty one where there is none.

    Raises:
        ConfigError: It is no COCO file.
    """
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        lists = [content.get('images', []), content.get('annotations', []), content['categories']]
        for part in lists:
            if not isinstance(part, list) or any(type(entry) is not dict for entry in part):
                raise TypeError('images, annotations and categories have to be lists of objects')
        coco = CocoFile(path, where or path, *lists)
        if not all(isinstance(name, str) for name in coco.names):
            raise TypeError('a category has another name than a string')
        return coco
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{path} is not an annotation file in COCO format (a json with images, '
            f'annotations and categories): {type(error).__name__}: {error}; {_CONVERT}'
        ) from error


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keeps Python from looking for garbage among a large file's millions of objects."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def check_entries(coco: CocoFile) -> list[Finding]:
    """Finds entries without the fields that mmdet reads, and ids that are there twice.

    Args:
        coco: The file.

    Returns:
        Fatal findings, in which mmdet would end with a traceback, or boxes get on other images.
    """
    if not coco.images:
        return [
            Finding(
                f'{coco.where} lists no images, so there is nothing to load; name a file whose '
                "'images' has an entry (id, file_name, width, height) for each image",
                fatal=True,
            )
        ]
    found = []
    for part, fields in _FIELDS.items():
        entries = getattr(coco, part)
        for name, is_right in fields.items():
            wrong = [entry for entry in entries if not is_right(entry.get(name))]
            if wrong:
                found.append(_without(coco.where, part, len(entries), name, wrong))
    return found or _twice(coco)


def usable(coco: CocoFile) -> CocoFile:
    """Leaves out entries without the fields that mmdet reads.

    Args:
        coco: The file.

    Returns:
        The same where :func:`check_entries` finds none.
    """
    kept: Any = {
        part: [e for e in getattr(coco, part) if all(f(e.get(name)) for name, f in fields.items())]
        for part, fields in _FIELDS.items()
    }
    return dataclasses.replace(coco, **kept)


def _without(
    where: str, part: str, total: int, name: str, wrong: Sequence[dict[str, Any]]
) -> Finding:
    value = wrong[0].get(name)
    had = f'{name}={value!r}' if name in wrong[0] else f'no {name}'
    rest = {key: wrong[0][key] for key in ('id', 'file_name', 'image_id') if key in wrong[0]}
    return Finding(
        f'{where}: {share(len(wrong), total, part)} have no usable {name!r}, and mmdet could not '
        f"load the file; write {name!r} into each entry of '{part}'; first: the entry with "
        f'{rest or "no id"}, which has {had}',
        fatal=True,
    )


def _twice(coco: CocoFile) -> list[Finding]:
    found = []
    files: dict[Any, str] = {}
    repeated = []
    for image in coco.images:
        before = files.setdefault(image['id'], image['file_name'])
        if before is not image['file_name']:
            repeated.append((image['id'], before, image['file_name']))
    if repeated:
        image_id, one, other = repeated[0]
        differ = any(one != other for _, one, other in repeated)
        told = (
            'all their boxes would be put on the last image of that id'
            if differ
            else 'mmdet takes the last entry of each'
        )
        found.append(
            Finding(
                f'{coco.where}: {share(len(repeated), len(coco.images), "images")} have the id of '
                f'another, and {told}; give every image an id of its own; first: id {image_id!r} '
                f'of {one!r} and of {other!r}',
                fatal=differ,
            )
        )
    seen: set[Any] = set()
    again = []
    for annotation in coco.annotations:
        if annotation['id'] in seen and annotation['image_id'] in files:
            again.append(annotation)
        seen.add(annotation['id'])
    if again:
        found.append(
            Finding(
                f'{coco.where}: {share(len(again), len(coco.annotations), "annotations")} have the '
                'id of another, which mmdet refuses to load; number them anew; first: '
                f'id {again[0]["id"]!r}, of image {files[again[0]["image_id"]]} among others',
                fatal=True,
            )
        )
    return found


def _is_id(value: Any) -> bool:
    return type(value) in (int, str, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and value > 0


_FIELDS: dict[str, dict[str, Callable[[Any], bool]]] = dict(
    images=dict(id=_is_id, file_name=_is_text, height=_is_size, width=_is_size),
    annotations=dict(id=_is_id, image_id=_is_id, category_id=_is_id),
    categories=dict(id=_is_id),
)
"""What mmdet reads of each entry."""

"""YOLO: a txt for each photo, a line for each box, and the names in data.yaml or a list."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Optional

import yaml

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.formats.folder import Folder
from mmdet_gdino_lora.formats.photos import Box, Labelled, Photo, shown_size, some_of

NAME = 'YOLO'
#: Lists of names, a line for each, as labelImg, Darknet and CVAT write them.
_LISTS = ('classes.txt', 'obj.names', '_darknet.labels', 'labels.txt')


class Data(NamedTuple):
    """What a data.yaml says, or a list of names.

    Attributes:
        path: Of the file.
        names: Class names by number.
        splits: The split of each photo that it puts somewhere.
        has_points: Whether key points follow the box in each line; else more numbers than a box
            has are an outline.
    """

    path: Path
    names: dict[int, str]
    splits: dict[Path, str]
    has_points: bool


def find(folder: Folder) -> list[Path]:
    """The folder's labels.

    Args:
        folder: Of photos.

    Returns:
        Paths of txt files that are called as a photo and begin as labels do; and of the data.yaml.
    """
    stems = {path.stem for path in folder.images}
    texts = [p for p in folder.ending('.txt') if p.stem in stems and _is_labels(p)]
    return texts + [path for path in folder.ending('.yaml', '.yml') if _is_data(path)]


def read(folder: Folder, labels: list[Path]) -> Labelled:
    """Reads labels. Sizes are those of the images as they are shown, as YOLO's tools have them.

    Args:
        folder: Of photos.
        labels: What :func:`find` found.

    Returns:
        The photos that have a txt, an empty one included; of an outline its bounding box.

    Raises:
        ConfigError: There are no class names, or a line is none of YOLO's.
    """
    texts = [path for path in labels if path.suffix.lower() == '.txt']
    data = _data(folder, [path for path in labels if path not in set(texts)], texts)
    photos: dict[Path, Photo] = {}
    unread, outlines = [], 0
    for path in texts:
        image = folder.image_of(path)
        if image is None:
            continue
        size = shown_size(image)
        if size is None:
            unread.append(image)
            continue
        boxes = []
        for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
            if line.strip():
                name, bbox, is_outline = _box(f'{path}, line {number}', line, data, size)
                boxes.append(Box(name, bbox))
                outlines += is_outline
        split = data.splits.get(image) or folder.split_of(image) or folder.split_of(path)
        photos[image] = Photo(image, size, boxes, split)
    told = []
    if unread:
        told.append(
            f'{len(unread)} photos can not be read and are left out: {some_of(unread, folder.root)}'
        )
    if outlines:
        told.append(f'{outlines} outlines have become the upright boxes around them')
    names = [data.names[number] for number in sorted(data.names)]
    return Labelled(folder.root, NAME, [photos[p] for p in sorted(photos)], names, told=told)


def _is_labels(path: Path) -> bool:
    with open(path, encoding='utf-8', errors='replace') as file:
        words = next((line.split() for line in file if line.strip()), None)
    return words is None or (len(words) >= 5 and words[0].isdigit() and _numbers(words) is not None)


def _numbers(words: list[str]) -> Optional[list[float]]:
    try:
        return [float(word) for word in words]
    except ValueError:
        return None


def _is_data(path: Path) -> bool:
    text = path.read_text(encoding='utf-8', errors='replace')
    return re.search(r'^[{\s"\']*(names|nc|train)["\']?\s*:', text, flags=re.M) is not None


def _data(folder: Folder, found: list[Path], texts: list[Path]) -> Data:
    """The names: of the one data.yaml, else of a list beside the labels or above them."""
    if len(found) > 1:
        raise ConfigError(
            f'{str(found[0])!r} and {str(found[1])!r} both look like a data.yaml; leave one of '
            'them in the folder'
        )
    if found:
        content = _content(found[0])
        names = _names(found[0], content.get('names'))
        splits = _splits(folder, found[0], content)
        return Data(found[0], names, splits, 'kpt_shape' in content)
    lists = [path for path in folder.files if path.name in _LISTS]
    if not lists:
        raise ConfigError(
            f'{str(folder.root)!r} has YOLO labels ({str(texts[0].relative_to(folder.root))!r}), '
            'and neither a data.yaml nor a classes.txt says what their classes are called; write '
            'the names into a data.yaml there: names: [first, second]'
        )
    lines = [[w.strip() for w in p.read_text(encoding='utf-8').splitlines()] for p in lists]
    if any(other != lines[0] for other in lines):
        raise ConfigError(
            f'{str(lists[0])!r} and {str(lists[1])!r} differ in their class names; leave one of '
            'them in the folder'
        )
    return Data(lists[0], dict(enumerate(filter(None, lines[0]))), {}, False)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = ' '.join(str(error).split())
        raise ConfigError(f'{str(path)!r} is no yaml: {reason}; correct it') from error
    return content if isinstance(content, dict) else {}


def _names(path: Path, names: Any) -> dict[int, str]:
    pairs = names.items() if isinstance(names, Mapping) else enumerate(names or ())
    result = {int(n): str(name).strip() for n, name in pairs if str(n).isdigit()}
    if not result or isinstance(names, str) or not all(result.values()):
        raise ConfigError(
            f'{str(path)!r} says names={names!r}, and the caption is made of the class names; '
            'write them in the order of their numbers: names: [first, second]'
        )
    if len(set(result.values())) < len(result):
        name = next(n for n in result.values() if list(result.values()).count(n) > 1)
        raise ConfigError(
            f'{str(path)!r} calls two classes {name!r}; give every class a name of its own'
        )
    return result


def _splits(folder: Folder, path: Path, content: Mapping[str, Any]) -> dict[Path, str]:
    """The photos that train, val and test name, by folders, lists or paths that are there."""
    result: dict[Path, str] = {}
    for split in ('test', 'val', 'train'):  # a photo of both is trained from
        value = content.get(split) or ()
        for entry in [value] if isinstance(value, str) else value:
            for place in _places(path, str(content.get('path') or ''), str(entry)):
                if place.is_dir():
                    inside = [image for image in folder.images if place in image.parents]
                elif place.suffix == '.txt':
                    lines = place.read_text(encoding='utf-8').split('\n')
                    listed = (folder.listed(place, line.strip()) for line in lines if line.strip())
                    inside = [image for image in listed if image is not None]
                else:
                    inside = [image for image in folder.images if image == place]
                result.update(dict.fromkeys(inside, split))
    return result


def _places(path: Path, root: str, entry: str) -> Iterator[Path]:
    """Where an entry of a data.yaml may be meant to lie, the first that is there.

    Roboflow writes ``../train/images`` for what lies beside the file.
    """
    inner = entry
    while inner.startswith('../'):
        inner = inner[3:]
    for place in (os.path.join(root, entry), entry, inner):
        full = Path(os.path.normpath(path.parent / place))
        if full.exists():
            yield full
            return


def _box(where: str, line: str, data: Data, size: tuple[int, int]) -> tuple[str, list[float], bool]:
    """Name, box in pixels, and whether it was made of an outline."""
    numbers = _numbers(line.split())
    if numbers is None or len(numbers) < 5 or not numbers[0].is_integer():
        raise ConfigError(
            f'{where}: {line.strip()!r} is no label of YOLO (class, x, y, width, height in 0..1); '
            'export the labels anew'
        )
    number, rest = int(numbers[0]), numbers[1:]
    if number not in data.names:
        raise ConfigError(
            f'{where}: class {number} is not among the {len(data.names)} names of {data.path}; '
            'write its name there'
        )
    is_outline = not data.has_points and len(rest) >= 6 and len(rest) % 2 == 0
    if is_outline:
        x, y = rest[::2], rest[1::2]
        left, top, width, height = min(x), min(y), max(x) - min(x), max(y) - min(y)
    else:
        width, height = rest[2:4]
        left, top = rest[0] - width / 2, rest[1] - height / 2
    scaled = [left * size[0], top * size[1], width * size[0], height * size[1]]
    rounded = [round(value, 2) if math.isfinite(value) else value for value in scaled]
    return data.names[number], rounded, is_outline

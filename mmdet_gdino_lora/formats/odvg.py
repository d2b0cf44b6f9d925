"""ODVG: a line of JSON for each photo, and a label map."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.formats.folder import Folder
from mmdet_gdino_lora.formats.photos import Box, Labelled, Photo, listed_size

NAME = 'ODVG'


def find(folder: Folder) -> list[Path]:
    """The folder's annotation files.

    Args:
        folder: Of photos.

    Returns:
        Paths of jsonl files, and of json files that hold as many lines, that begin as ODVG's do.
    """
    return [path for path in folder.ending('.jsonl', '.json') if _is_odvg(path)]


def read(folder: Folder, labels: list[Path]) -> Labelled:
    """Reads annotation files of detection data.

    Args:
        folder: Of photos.
        labels: What :func:`find` found.

    Returns:
        The photos that a file lists, also those that are missing.

    Raises:
        ConfigError: A line is none of ODVG's detection data, or its label has no name.
    """
    map_ = _label_map(folder)
    photos: dict[Path, Photo] = {}
    names: dict[Any, str] = dict(map_)
    for labels_path in labels:
        split = folder.split_of(labels_path, named=True)
        text = labels_path.read_text(encoding='utf-8')
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            where = f'{labels_path}, line {number}'
            entry = _entry(where, line)
            found = folder.listed(labels_path, entry['filename'])
            path = found or folder.root / entry['filename'].lstrip('/')
            if path in photos:
                raise ConfigError(f'{where} lists {str(path)!r} again; take one of the two out')
            size = listed_size(entry, path)
            boxes = []
            for instance in entry['detection'].get('instances', ()):
                name = _name(where, instance, map_)
                names.setdefault(instance.get('label', name), name)
                boxes.append(Box(name, _sized(instance.get('bbox'))))
            photos[path] = Photo(path, size, boxes, split)
    ordered = sorted(names, key=lambda key: (not isinstance(key, int), key))
    unique = list(dict.fromkeys(names[key] for key in ordered))
    return Labelled(folder.root, NAME, [photos[path] for path in sorted(photos)], unique)


def _is_odvg(path: Path) -> bool:
    with open(path, encoding='utf-8', errors='replace') as file:
        line = next((line for line in file if line.strip()), '')
    if '"filename"' not in line or len(line) > 2**24:
        return False
    try:
        entry = json.loads(line)
    except ValueError:
        return path.suffix == '.jsonl'  # which reading it tells
    return isinstance(entry, dict) and bool({'detection', 'grounding'}.intersection(entry))


def _entry(where: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f'{where} is no JSON ({error}); export the file anew') from error
    if isinstance(entry, dict) and 'grounding' in entry:
        raise ConfigError(
            f'{where} has phrases of a caption (grounding), which have no classes; train from them '
            'with the config gdino_lora_phrases'
        )
    right = isinstance(entry, dict) and isinstance(entry.get('filename'), str)
    if not right or not isinstance(entry.get('detection'), dict):
        raise ConfigError(
            f'{where} has no filename or no detection, which ODVG lines have; export the file anew'
        )
    return entry


def _label_map(folder: Folder) -> dict[int, str]:
    """The names by number, of the json that holds nothing else."""
    for path in folder.ending('.json'):
        if path.stat().st_size > 2**24:
            continue
        try:
            content = json.loads(path.read_text(encoding='utf-8'))
        except ValueError:
            continue
        if isinstance(content, dict) and content and all(key.isdigit() for key in content):
            return {int(key): str(name) for key, name in content.items()}
    return {}


def _name(where: str, instance: Mapping[str, Any], map_: Mapping[int, str]) -> str:
    label = instance.get('label')
    name = map_.get(label, instance.get('category')) if type(label) is int else None
    name = name or instance.get('category')
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f'{where} has the label {label!r} without a name; put the label map beside it, a json '
            'such as {"0": "cat", "1": "dog"}'
        )
    return name


def _sized(bbox: Any) -> Any:
    """x, y, width, height of corners; what is no box stays as it is."""
    is_box = isinstance(bbox, list) and len(bbox) == 4
    if not is_box or not {type(value) for value in bbox} <= {int, float}:
        return bbox
    left, top, right, bottom = bbox
    return [left, top, right - left, bottom - top]

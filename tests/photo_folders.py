"""Labelled photos as each label tool writes them: the same boxes in every format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
#: Real photos, where they lie beside the checkout.
SHARED = ROOT.parent / 'shared' / 'data'


class Thing(NamedTuple):
    """A photo's labels: corners in pixels by class name, in the order of the file."""

    name: str
    size: tuple[int, int]
    boxes: Sequence[tuple[str, tuple[float, float, float, float]]]


#: Seven photos: one shows nothing, one class is in a single photo.
THINGS = [
    Thing('a', (64, 48), [('bolt', (4, 6, 20, 30)), ('nut', (30, 10, 50, 40))]),
    Thing('b', (64, 48), [('bolt', (1, 1, 63, 47))]),
    Thing('c', (48, 64), [('nut', (10, 11, 21, 33))]),
    Thing('d', (64, 64), []),
    Thing('e', (64, 64), [('nut', (5, 5, 25, 25)), ('nut', (35, 35, 60, 60))]),
    Thing('f', (64, 64), [('washer', (8, 8, 40, 44))]),
    Thing('g', (64, 64), [('bolt', (20, 20, 33, 55))]),
]
NAMES = ('bolt', 'nut', 'washer')


def real(name: str) -> Path:
    """A folder of real photos; the test is skipped where it isn't there."""
    if not (SHARED / name).is_dir():
        pytest.skip(f'{SHARED / name} is not there')
    return SHARED / name


def write_photo(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    """Writes noise of a width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.stem.encode()])
    noise = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), noise)


def voc_xml(thing: Thing, difficult: Sequence[int] = ()) -> str:
    """labelImg's xml."""
    objects = ''
    for place, (name, corners) in enumerate(thing.boxes):
        keys = ('xmin', 'ymin', 'xmax', 'ymax')
        box = ''.join(f'<{key}>{value}</{key}>' for key, value in zip(keys, corners))
        objects += (
            f'<object><name>{name}</name><difficult>{int(place in difficult)}</difficult>'
            f'<bndbox>{box}</bndbox></object>'
        )
    width, height = thing.size
    return (
        f'<annotation><filename>{thing.name}.jpg</filename><size><width>{width}</width>'
        f'<height>{height}</height><depth>3</depth></size>{objects}</annotation>'
    )


def yolo_txt(thing: Thing, names: Sequence[str] = NAMES, digits: int = 6) -> str:
    """Ultralytics' lines."""
    lines = []
    for name, (left, top, right, bottom) in thing.boxes:
        width, height = thing.size
        values = ((left + right) / 2 / width, (top + bottom) / 2 / height)
        values += ((right - left) / width, (bottom - top) / height)
        numbers = ' '.join(f'{value:.{digits}f}' for value in values)
        lines.append(f'{names.index(name)} {numbers}\n')
    return ''.join(lines)


def coco(things: Sequence[Thing], names: Sequence[str] = NAMES, first: int = 1) -> dict[str, Any]:
    """A COCO file's content; category ids begin at ``first``."""
    images, annotations = [], []
    for number, thing in enumerate(things):
        width, height = thing.size
        images.append(
            dict(id=100 + number, file_name=f'{thing.name}.jpg', width=width, height=height)
        )
        for name, (left, top, right, bottom) in thing.boxes:
            box = [left, top, right - left, bottom - top]
            annotations.append(
                dict(
                    id=1000 + len(annotations), image_id=100 + number, bbox=box, iscrowd=0,
                    category_id=first + names.index(name), area=box[2] * box[3],
                )
            )  # fmt: skip
    categories = [dict(id=first + place, name=name) for place, name in enumerate(names)]
    return dict(images=images, annotations=annotations, categories=categories)


def odvg_lines(things: Sequence[Thing], names: Sequence[str] = NAMES) -> str:
    """ODVG's lines of detection data."""
    lines = []
    for thing in things:
        instances = [
            dict(bbox=list(corners), label=names.index(name), category=name)
            for name, corners in thing.boxes
        ]
        width, height = thing.size
        entry = dict(filename=f'{thing.name}.jpg', width=width, height=height)
        lines.append(json.dumps(dict(entry, detection=dict(instances=instances))) + '\n')
    return ''.join(lines)


def write(root: Path, files: Mapping[str, Any]) -> Path:
    """Writes texts, and what isn't one as json, by path below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def photos(root: Path, folder: str, things: Sequence[Thing] = THINGS) -> Path:
    """Writes the photos of things into a folder below another."""
    for thing in things:
        write_photo(root / folder / f'{thing.name}.jpg', thing.size)
    return root


YAML = 'train: ../train/images\nval: ../valid/images\nnc: 3\nnames: [bolt, nut, washer]\n'
LABEL_MAP = {str(place): name for place, name in enumerate(NAMES)}


def voc_beside(root: Path) -> Path:
    return write(photos(root, ''), {f'{t.name}.xml': voc_xml(t) for t in THINGS})


def voc_apart(root: Path) -> Path:
    files = {f'Annotations/{t.name}.xml': voc_xml(t) for t in THINGS}
    return write(photos(root, 'JPEGImages'), files)


def coco_apart(root: Path) -> Path:
    return write(photos(root, 'images'), {'annotations/all.json': coco(THINGS)})


def coco_beside(root: Path) -> Path:
    return write(photos(root, ''), {'result.json': coco(THINGS)})


def roboflow(root: Path) -> Path:
    """Roboflow's COCO: a folder for each split, and a category 0 that is the project's name."""
    for folder, things in dict(train=THINGS[:5], valid=THINGS[5:]).items():
        content = coco(things)
        content['categories'].insert(0, dict(id=0, name='screws', supercategory='none'))
        write(photos(root, folder, things), {f'{folder}/_annotations.coco.json': content})
    return root


def yolo_apart(root: Path) -> Path:
    files = {f'labels/{t.name}.txt': yolo_txt(t) for t in THINGS}
    return write(photos(root, 'images'), dict(files, **{'data.yaml': YAML}))


def yolo_beside(root: Path) -> Path:
    files = {f'{t.name}.txt': yolo_txt(t) for t in THINGS}
    return write(photos(root, ''), dict(files, **{'classes.txt': 'bolt\nnut\nwasher\n'}))


def yolo_splits(root: Path) -> Path:
    for folder, things in dict(train=THINGS[:5], valid=THINGS[5:]).items():
        photos(root, f'{folder}/images', things)
        write(root, {f'{folder}/labels/{t.name}.txt': yolo_txt(t) for t in things})
    return write(root, {'data.yaml': YAML})


def odvg(root: Path) -> Path:
    files = {'train.jsonl': odvg_lines(THINGS), 'label_map.json': LABEL_MAP}
    return write(photos(root, 'images'), files)


LAYOUTS = {
    'voc, beside': (voc_beside, 'Pascal VOC'),
    'voc, apart': (voc_apart, 'Pascal VOC'),
    'coco, beside': (coco_beside, 'COCO'),
    'coco, apart': (coco_apart, 'COCO'),
    'roboflow': (roboflow, 'COCO'),
    'yolo, beside': (yolo_beside, 'YOLO'),
    'yolo, apart': (yolo_apart, 'YOLO'),
    'yolo, splits': (yolo_splits, 'YOLO'),
    'odvg': (odvg, 'ODVG'),
}

"""Draws small data sets in the formats of mmdet's own configs: a noisy picture with two boxes."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmdet.registry import DATASETS

#: Height and width of the pictures.
SIZE = (48, 64)
#: Of the boxes, x y w h; both are large enough for every filter of mmdet's.
BOXES = [(4, 4, 20, 16), (24, 12, 28, 24)]
#: Names of D-cube, of the four lengths that its metric tells apart.
SENTENCES = ['red star', 'a hot dog on a table', 'dog ' * 7 + 'car', 'cat ' * 11 + 'car']
CAPTION = 'a red star beside the hot dog'
PHRASES = [(2, 10), (18, 29)]
#: Class names where a config leaves them to its files.
NAMES = ('red star', 'hot dog', 'car')
#: Most class names of a data set: LVIS has 1203 of them, and every forty are shown to the model.
MOST_NAMES = 45
_LABEL_MAP = {str(number): name for number, name in enumerate(NAMES)}
_IMAGE = dict(id=1, file_name='1.jpg', height=SIZE[0], width=SIZE[1])


class Drawer:
    """Writes the files that data sets of a config name, and changes their paths to them.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
        cv2.imwrite(str(folder / '1.jpg'), pixels)
        (folder / 'names.json').write_text(json.dumps(_LABEL_MAP))
        self._numbers = itertools.count()

    def draw(self, dataset: dict) -> list[str]:
        """Draws a data set's files, or those of all that it wraps.

        Args:
            dataset: Its config, changed in place.

        Returns:
            Of each its annotation file.
        """
        inner = dataset.get('datasets') or [dataset[k] for k in ('dataset',) if k in dataset]
        if inner:
            return [path for part in inner for path in self.draw(part)]
        names = [cls.__name__ for cls in DATASETS.get(dataset['type']).__mro__]
        kind = next(name for name in names if name in _FORMATS)
        for step in dataset['pipeline']:
            if step.get('label_map_file'):
                step['label_map_file'] = str(self.folder / 'names.json')
        path = self.folder / f'{next(self._numbers)}.json'
        dataset['data_root'] = f'{self.folder}/'
        dataset['ann_file'] = path.name
        dataset['data_prefix'] = dict(img='')
        _FORMATS[kind](path, dataset)
        return [str(path)]


def _classes(dataset: Mapping[str, Any]) -> Sequence[str]:
    given = (dataset.get('metainfo') or {}).get('classes')
    return given or DATASETS.get(dataset['type']).METAINFO['classes']


def _boxes(count: int = 2, classes: int = 2) -> list[dict]:
    """Boxes of the first classes, one after the other."""
    return [
        dict(
            id=number + 1,
            image_id=1,
            category_id=number % classes + 1,
            bbox=list(box),
            area=box[2] * box[3],
            iscrowd=0,
            segmentation=[[0, 0, 4, 0, 4, 4]],
        )
        for number, box in zip(range(count), itertools.cycle(BOXES))
    ]


def _write(path: Path, images: list[dict], annotations: list[dict], names: Sequence[str]) -> None:
    categories = [
        dict(id=number + 1, name=name, frequency='rcf'[number % 3])
        for number, name in enumerate(names)
    ]
    content = dict(info={}, images=images, annotations=annotations, categories=categories)
    path.write_text(json.dumps(content))


def _coco(path: Path, dataset: dict) -> None:
    names = _classes(dataset)
    _write(path, [_IMAGE], _boxes(classes=min(2, len(names))), names)


def _lvis(path: Path, dataset: dict) -> None:
    names = _classes(dataset)[:MOST_NAMES]
    dataset['metainfo'] = dict(classes=names)
    image = dict(_IMAGE, coco_url='http://images.cocodataset.org/1.jpg')
    image.update(neg_category_ids=[3], not_exhaustive_category_ids=[])
    _write(path, [image], _boxes(), names)


def _odvg(path: Path, dataset: dict) -> None:
    corners = [[x, y, x + w, y + h] for x, y, w, h in BOXES]
    line: dict = dict(filename='1.jpg', height=SIZE[0], width=SIZE[1])
    if dataset.get('label_map_file'):
        dataset['label_map_file'] = 'names.json'
        instances = [dict(bbox=b, label=n, category=NAMES[n]) for n, b in enumerate(corners)]
        line['detection'] = dict(instances=instances)
    else:
        regions = [
            dict(bbox=box, phrase=CAPTION[begin:end], tokens_positive=[[begin, end]])
            for box, (begin, end) in zip(corners, PHRASES)
        ]
        line['grounding'] = dict(caption=CAPTION, regions=regions)
    path.write_text(json.dumps(line) + '\n')


def _flickr(path: Path, dataset: dict) -> None:
    spans = [[list(span)] for span in PHRASES]
    image = dict(_IMAGE, caption=CAPTION, tokens_positive_eval=spans)
    _write(path, [image], [dict(a, phrase_ids=n) for n, a in enumerate(_boxes())], NAMES)


def _refcoco(path: Path, dataset: dict) -> None:
    image = dict(_IMAGE, caption=CAPTION, dataset_name='refcoco')
    # gRefCOCO's metric divides by the number of captions that mean nothing in their image
    nothing = dict(image, id=2, caption='the car')
    boxes = _boxes()[:1]
    boxes.append(dict(boxes[0], id=2, image_id=2, category_id=-1))
    _write(path, [image, nothing], boxes, NAMES)


def _dod(path: Path, dataset: dict) -> None:
    names = SENTENCES
    _write(path, [_IMAGE], _boxes(len(names), len(names)), names)
    folder = path.with_suffix('')
    folder.mkdir()
    numbers = list(range(1, len(names) + 1))
    sentences = {n: dict(id=n, anno_id=[n], raw_sent=name) for n, name in zip(numbers, names)}
    boxes = {n: dict(id=n, sent_id=[n], image_id=1) for n in numbers}
    images = {1: dict(_IMAGE, anno_id=numbers, group_id=0)}
    groups = {0: dict(id=0, inner_sent_id=numbers, img_id=[1])}
    for name, content in (
        ('sentences', sentences),
        ('annotations', boxes),
        ('images', images),
        ('groups', groups),
    ):
        (folder / f'{name}.pkl').write_bytes(pickle.dumps(content))
    dataset['data_prefix'] = dict(img='', anno=folder.name)


_FORMATS: dict[str, Callable[[Path, dict], None]] = dict(
    DODDataset=_dod,
    Flickr30kDataset=_flickr,
    LVISV05Dataset=_lvis,
    LVISV1Dataset=_lvis,
    MDETRStyleRefCocoDataset=_refcoco,
    ODVGDataset=_odvg,
    CocoDataset=_coco,
)

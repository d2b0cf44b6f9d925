"""Mistakes in annotation files: what each is told as, before the run, and whether it stops it."""
# ruff: noqa: E501  a row of the table is a line

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Callable

import pytest
from mmdet.registry import DATASETS

from tests.mistakes.conftest import CLASSES, Case

STOPS, GOES_ON = True, False
FIRST = 'first: image 0.jpg, annotation 1'


def boxes(*values: Any, all_: bool = False) -> Callable[[Case], None]:
    """Writes boxes in the place of the first ones, or in turn in that of all."""

    def mistake(case: Case) -> None:
        entries = case.file['annotations']
        for place, entry in enumerate(entries if all_ else entries[: len(values)]):
            entry['bbox'] = values[place % len(values)]

    return mistake


def entry(part: str, **fields: Any) -> Callable[[Case], None]:
    """Changes fields of the first entry of a part; None takes a field out."""
    return entries(part, 1, **fields)


def entries(part: str, count: int, **fields: Any) -> Callable[[Case], None]:
    def mistake(case: Case) -> None:
        for found in case.file[part][:count]:
            for name, value in fields.items():
                if value is None:
                    del found[name]
                else:
                    found[name] = value

    return mistake


def part(name: str, value: Any) -> Callable[[Case], None]:
    def mistake(case: Case) -> None:
        case.file[name] = value

    return mistake


def classes(*names: Any) -> Callable[[Case], None]:
    def mistake(case: Case) -> None:
        case.data.metainfo = dict(classes=names)

    return mistake


def another_category(**category: Any) -> Callable[[Case], None]:
    def mistake(case: Case) -> None:
        case.file['categories'].append(category)

    return mistake


def image_again(case: Case) -> None:
    case.file['images'].append({**case.file['images'][0], 'file_name': 'elsewhere.jpg'})


def image_listed_twice(case: Case) -> None:
    case.file['images'].append(dict(case.file['images'][0]))


def val_without_annotations(case: Case) -> None:
    path = case.root / 'annotations/val.json'
    path.write_text(json.dumps({**json.loads(path.read_text()), 'annotations': []}))


def val_with_a_flat_box(case: Case) -> None:
    path = case.root / 'annotations/val.json'
    content = json.loads(path.read_text())
    content['annotations'][0]['bbox'][2] = 0
    path.write_text(json.dumps(content))


def folder_of(*names: str) -> Callable[[Case], None]:
    def mistake(case: Case) -> None:
        (case.root / 'labels').mkdir()
        for name in names:
            (case.root / 'labels' / name).write_text('')
        case.data.ann_file = 'labels'

    return mistake


def file_of(name: str, text: str) -> Callable[[Case], None]:
    def mistake(case: Case) -> None:
        (case.root / name).write_text(text)
        case.data.ann_file = name

    return mistake


#: What is done to the data, what is said (parts of one sentence; FILE: its path), and whether it
#: ends the run. There are 6 annotations of 3 classes in 2 images of 64 x 64.
TABLE = {
    'width of 0': (boxes([4, 4, 0, 20]), f'FILE...1 of 6 boxes have a width or height of 0...background...take them out...{FIRST}, bbox=[4, 4, 0, 20]', GOES_ON),
    'negative height': (boxes([4, 4, 9, -20]), f'1 of 6 boxes have a width or height of 0 or less...mmdet drops them...{FIRST}', GOES_ON),
    'thinner than a pixel': (boxes([4, 4, 0.5, 20]), f'1 of 6 boxes are thinner than a pixel...{FIRST}', GOES_ON),
    'NaN': (boxes([math.nan, 4, 9, 20]), f'1 of 6 boxes hold NaN or infinity...{FIRST}', GOES_ON),
    'infinity': (boxes([4, 4, math.inf, 20]), f'1 of 6 boxes hold NaN or infinity...{FIRST}', GOES_ON),
    'outside of the image': (boxes([70, 4, 9, 20]), f'1 of 6 boxes lie outside of their image...{FIRST}', GOES_ON),
    'reaching out of the image': (boxes([40, 4, 60, 20]), f'1 of 6 boxes reach more than 2 pixels out...cut off...{FIRST}', GOES_ON),
    'corners in the place of sizes': (boxes([30, 30, 60, 60], [5, 40, 50, 63], [10, 12, 30, 33], all_=True), '4 of 6 boxes reach out of their image as [x, y, width, height]...fit as [x1, y1, x2, y2]...write bbox=[x1, y1, x2 - x1, y2 - y1]', STOPS),
    'relative to the image': (boxes([0.1, 0.2, 0.5, 0.5], all_=True), f'6 of 6 boxes lie in 0..1...multiply x and width...{FIRST}', STOPS),
    'most relative to the image': (boxes(*[[0.1, 0.2, 0.5, 0.5]] * 4), '4 of 6 boxes lie in 0..1', STOPS),
    'every box flat': (boxes([4, 4, 9, 0], all_=True), 'FILE...nothing is left to learn...none of its 6 boxes', STOPS),
    'every box outside': (boxes([99, 99, 9, 9], all_=True), 'nothing is left to learn', STOPS),
    'no bbox': (entry('annotations', bbox=None), f'1 of 6 boxes have no bbox of four numbers...write bbox=[x, y, width, height]...{FIRST}', STOPS),
    'bbox of three numbers': (boxes([4, 4, 9]), f'1 of 6 boxes have no bbox of four numbers...{FIRST}, bbox=[4, 4, 9]', STOPS),
    'bbox as text': (boxes('4 4 9 20'), f"no bbox of four numbers...{FIRST}, bbox='4 4 9 20'", STOPS),
    'numbers as text': (boxes(['4', '4', '9', '20']), 'no bbox of four numbers', STOPS),
    'null among the numbers': (boxes([4, 4, None, 20]), 'no bbox of four numbers', STOPS),
    'no area': (entries('annotations', 2, area=None), f"2 of 6 boxes have no number as 'area'...area=width * height...{FIRST}", STOPS),
    'area of 0': (entry('annotations', area=0), f'1 of 6 boxes have an area of 0 or less...area=width * height...{FIRST}', GOES_ON),
    'unknown category id': (entry('annotations', category_id=77), f"1 of 6 boxes have a category_id that is not among the file's categories...correct category_id=77...{FIRST}", GOES_ON),
    'every category id unknown': (entries('annotations', 6, category_id=0), 'nothing is left to learn', STOPS),
    'annotation of an image not listed': (entry('annotations', image_id=9), "1 of 6 boxes have an image_id that is not among...first: image_id 9, annotation 1", GOES_ON),
    'no annotation of a listed image': (entries('annotations', 6, image_id='0.jpg'), 'nothing is left to learn', STOPS),
    'annotation without image_id': (entry('annotations', image_id=None), "1 of 6 annotations have no usable 'image_id'...first: the entry with {'id': 1}", STOPS),
    'annotation without id': (entry('annotations', id=None), "1 of 6 annotations have no usable 'id'", STOPS),
    'annotation without category_id': (entry('annotations', category_id=None), "no usable 'category_id'", STOPS),
    'annotation id twice': (entries('annotations', 2, id=1), 'FILE...1 of 6 annotations have the id of another...number them anew...first: id 1', STOPS),
    'no annotations': (part('annotations', []), 'FILE...has no annotations for its 2 images...nothing to learn from', STOPS),
    'no list of annotations': (lambda case: case.file.pop('annotations'), 'has no annotations', STOPS),
    'no annotations to measure on': (val_without_annotations, 'val_dataloader.dataset.ann_file=...has no annotations...every AP would be -1', GOES_ON),
    'flat box to measure on': (val_with_a_flat_box, 'val_dataloader.dataset.ann_file=...1 of 6 boxes have a width or height of 0...count as missed', GOES_ON),
    'no images': (part('images', []), 'FILE...lists no images', STOPS),
    'image without height': (entry('images', height=None), "1 of 2 images have no usable 'height'...first: the entry with {'id': 0, 'file_name': '0.jpg'}", STOPS),
    'width as text': (entry('images', width='64'), "1 of 2 images have no usable 'width'...width='64'", STOPS),
    'image without file_name': (entry('images', file_name=None), "1 of 2 images have no usable 'file_name'", STOPS),
    'image id twice': (image_again, "1 of 3 images have the id of another...an id of its own...first: id 0 of '0.jpg' and of 'elsewhere.jpg'", STOPS),
    'image listed twice': (image_listed_twice, '1 of 3 images have the id of another, and mmdet takes the last', GOES_ON),
    'images as an object': (part('images', dict(a=1)), 'FILE is not an annotation file in COCO format', STOPS),
    'category without id': (entry('categories', id=None), "1 of 3 categories have no usable 'id'", STOPS),
    'category name that is a number': (entry('categories', name=3), 'a category has another name than a string', STOPS),
    'category twice': (another_category(id=9, name=CLASSES[0]), "FILE...'red circle' stands twice among the categories...join their annotations", STOPS),
    'category id twice': (entry('categories', id=2), 'several categories have the id 2...renumber the categories', STOPS),
    'class left out': (classes(*CLASSES[:2]), "train_dataloader.dataset.metainfo.classes leaves out 1 of the 3 categories...'hot star'...2 of 6 boxes are trained as background", GOES_ON),
    'class named twice': (classes(CLASSES[0], *CLASSES), "metainfo.classes names 'red circle' twice...name each class once", STOPS),
    'no classes': (classes(), 'metainfo.classes is empty', STOPS),
    'class that is a number': (classes(1, 2), 'metainfo.classes holds 1, 2 where names are wanted', STOPS),
    'folder of VOC xml': (folder_of('a.xml', 'b.xml'), "labels' is a folder of 2 .xml files, Pascal VOC's annotations, where a file is wanted; convert", STOPS),
    'folder of YOLO txt': (folder_of('a.txt', 'b.txt', 'notes.md'), "a folder of 2 .txt files, YOLO's labels, where a file is wanted", STOPS),
    'folder of images': (folder_of('a.jpg'), 'a folder of 1 .jpg file, images, where a file is wanted', STOPS),
    'empty folder': (folder_of(), 'a folder of nothing where a file is wanted', STOPS),
    'xml in the place of json': (file_of('a.xml', '<annotation/>'), 'a.xml is not an annotation file in COCO format...convert the annotations', STOPS),
    'json cut short': (file_of('a.json', '{"images": [{"id"'), 'a.json is not an annotation file in COCO format', STOPS),
}  # fmt: skip


@pytest.mark.parametrize('mistake, sentence, stops', TABLE.values(), ids=list(TABLE))
def test_a_mistake_in_the_annotations_is_told_in_one_sentence(
    case: Case, mistake: Callable[[Case], None], sentence: str, stops: bool
) -> None:
    mistake(case)
    case.expect(sentence, stops)


def test_nothing_is_said_of_data_that_is_right(case: Case) -> None:
    assert case.check() == ([], None)
    # a pixel over the edge is rounding, and crowds and ignored boxes are COCO's own
    case.file['annotations'][0]['bbox'] = [44, 40, 21.5, 24.6]
    case.file['annotations'][1]['iscrowd'] = 1
    case.file['annotations'][2] = dict(ignore=1, id=3, image_id=0, category_id=1)
    assert case.check() == ([], None)


def test_large_boxes_that_fit_their_images_are_not_taken_for_corners(case: Case) -> None:
    boxes([2, 2, 60, 60], [1, 1, 62, 62], all_=True)(case)
    assert case.check() == ([], None)


@pytest.mark.parametrize(
    'bbox, area',
    [([4, 4, 0, 20], 9), ([4, 4, 9, -2], 9), ([4, 4, 0.5, 9], 9), ([70, 4, 9, 9], 9)]
    + [([math.nan, 4, 9, 9], 9), ([4, math.nan, 9, 9], 9), ([4, 4, math.nan, 9], 9)]
    + [([4, 4, 9, 9], 0), ([40, 4, 60, 20], 9), ([4, 4, 9, 20], 9)],
)
def test_what_is_called_dropped_is_what_mmdet_drops(case: Case, bbox: list, area: float) -> None:
    case.file['annotations'][0].update(bbox=bbox, area=area)
    warned, _ = case.check()
    data = DATASETS.build({**case.data, 'pipeline': [], 'lazy_init': False})
    kept = sum(len(data.get_data_info(place)['instances']) for place in range(len(data)))
    assert kept == (5 if any('mmdet drops them' in sentence for sentence in warned) else 6)


@pytest.mark.parametrize(
    'name',
    ['no bbox', 'bbox of three numbers', 'bbox as text', 'numbers as text', 'no area']
    + ['null among the numbers', 'annotation without id', 'annotation id twice', 'no images']
    + ['image without height', 'width as text', 'image without file_name'],
)
def test_what_is_said_not_to_load_is_what_mmdet_ends_at(case: Case, name: str) -> None:
    TABLE[name][0](case)
    case.check()
    with pytest.raises((KeyError, TypeError, ValueError, AssertionError)):
        DATASETS.build({**case.data, 'pipeline': [], 'lazy_init': False})


def test_several_ranks_warn_once_and_all_of_them_stop(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('RANK', '1')
    boxes([4, 4, 0, 20])(case)
    assert case.check() == ([], None)
    boxes([4, 4, 0, 20], all_=True)(case)
    assert case.check()[1] is not None


def test_annotations_on_another_machine_are_left_alone(case: Case) -> None:
    case.data.data_root = 's3://bucket/data/'
    assert case.check() == ([], None)


def test_the_file_is_named_by_key_and_path(case: Case) -> None:
    boxes([4, 4, 0, 20])(case)
    ((told,), _) = case.check()
    assert told.startswith(f"train_dataloader.dataset.ann_file='{Path(case.path)}': ")

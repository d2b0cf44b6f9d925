"""Folders of labelled photos: the same boxes whatever the format, and mistakes in one sentence."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.formats.names import is_code
from mmdet_gdino_lora.formats.photos import Labelled, count_boxes
from mmdet_gdino_lora.formats.recognise import read_photos
from mmdet_gdino_lora.formats.split import take_off
from mmdet_gdino_lora.formats.written import as_coco, categories_of
from tests.photo_folders import (
    LAYOUTS,
    NAMES,
    THINGS,
    YAML,
    Thing,
    coco,
    odvg_lines,
    photos,
    real,
    roboflow,
    voc_xml,
    write,
    write_photo,
    yolo_apart,
    yolo_splits,
    yolo_txt,
)

Boxes = dict[str, list[tuple[str, list[float]]]]


def boxes_of(labelled: Labelled) -> Boxes:
    return {p.path.stem: [(box.name, box.bbox) for box in p.boxes] for p in labelled.photos}


def assert_same(found: Boxes, wanted: Boxes, within: float) -> None:
    assert found.keys() == wanted.keys()
    for name, boxes in wanted.items():
        assert [box[0] for box in found[name]] == [box[0] for box in boxes]
        for one, other in zip(found[name], boxes):
            assert one[1] == pytest.approx(other[1], abs=within)


# -------------------------------------------------------------------------------- the same boxes


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_layout_is_recognised_and_says_the_same(layout: str, tmp_path: Path) -> None:
    make, format_ = LAYOUTS[layout]
    before = sorted(make(tmp_path).rglob('*'))
    labelled = read_photos(str(tmp_path))
    assert labelled.format == format_
    wanted = {
        t.name: [(n, [x1, y1, x2 - x1, y2 - y1]) for n, (x1, y1, x2, y2) in t.boxes] for t in THINGS
    }
    assert_same(boxes_of(labelled), wanted, 0.01 if format_ == 'YOLO' else 0)
    assert {p.path.stem: p.size for p in labelled.photos} == {t.name: t.size for t in THINGS}
    assert [name for name in labelled.names if name != 'screws'] == list(NAMES)
    has_splits = layout in ('roboflow', 'yolo, splits')
    assert len(labelled.split('val')) == (2 if has_splits else 0)
    assert sorted(tmp_path.rglob('*')) == before


def test_the_raccoons_are_the_same_as_yolo_and_as_roboflow(tmp_path: Path) -> None:
    labelled = read_photos(str(real('raccoon')))
    assert (labelled.format, len(labelled.photos)) == ('Pascal VOC', 200)
    assert count_boxes(labelled.photos) == {'raccoon': 217}
    for place, photo in enumerate(labelled.photos):
        folder = 'valid' if place % 5 == 0 else 'train'
        corners = [(x, y, x + w, y + h) for x, y, w, h in (box.bbox for box in photo.boxes)]
        thing = Thing(photo.path.stem, photo.size, [('raccoon', box) for box in corners])
        for root in ('yolo', 'roboflow'):
            name = photo.path.name if root == 'roboflow' else f'images/{photo.path.name}'
            link = tmp_path / root / folder / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(photo.path)
        text = yolo_txt(thing, ['raccoon'])
        write(tmp_path, {f'yolo/{folder}/labels/{thing.name}.txt': text})
    write(tmp_path, {'yolo/data.yaml': 'names: [raccoon]\nval: valid/images\n'})
    for folder in ('train', 'valid'):
        chosen = [p for n, p in enumerate(labelled.photos) if (n % 5 == 0) == (folder == 'valid')]
        content = as_coco(labelled, chosen, categories_of(['raccoon'], {}))
        for image in content['images']:
            image['file_name'] = os.path.basename(image['file_name'])
        content['categories'].insert(0, dict(id=0, name='raccoons', supercategory='none'))
        write(tmp_path, {f'roboflow/{folder}/_annotations.coco.json': content})
    for root, within in dict(yolo=0.01, roboflow=0).items():
        again = read_photos(str(tmp_path / root))
        assert_same(boxes_of(again), boxes_of(labelled), within)
        assert len(again.split('val')) == 40


def test_the_cards_have_splits_and_coco_keeps_its_ids() -> None:
    cards = read_photos(str(real('cards')))
    assert [len(cards.split(name)) for name in ('train', 'val', 'test')] == [296, 0, 67]
    assert cards.names == ['ace', 'jack', 'king', 'nine', 'queen', 'ten'] and cards.told == []
    tiny = real('coco_tiny')
    labelled = read_photos(str(tiny))
    for split in ('train', 'val'):
        source = json.loads((tiny / f'annotations/instances_{split}2017.json').read_text())
        categories = categories_of(labelled.names, labelled.ids)
        content = as_coco(labelled, labelled.split(split), categories)
        by_id = {entry['id']: entry for entry in content['annotations']}
        assert by_id == {entry['id']: entry for entry in source['annotations']}
        assert [i['id'] for i in content['images']] == [i['id'] for i in source['images']]
        assert {c['id']: c['name'] for c in content['categories']} == {
            c['id']: c['name'] for c in source['categories']
        }


# --------------------------------------------------------------------------- what is kept, what not


def test_difficult_boxes_are_crowds_and_empty_photos_stay(tmp_path: Path) -> None:
    xmls = {f'{t.name}.xml': voc_xml(t, difficult=[1]) for t in THINGS}
    labelled = read_photos(str(write(photos(tmp_path, ''), xmls)))
    content = as_coco(labelled, labelled.photos, categories_of(labelled.names, {}))
    assert [a['iscrowd'] for a in content['annotations']] == [0, 1, 0, 0, 0, 1, 0, 0]
    assert len(content['images']) == len(THINGS)
    assert '2 boxes are marked difficult' in labelled.told[0]


def test_photos_that_nobody_labelled_are_left_out_and_told(tmp_path: Path) -> None:
    root = yolo_apart(tmp_path)
    write_photo(root / 'images/new.jpg', (64, 64))
    (root / 'labels/orphan.txt').write_text('0 0.5 0.5 0.1 0.1\n')
    labelled = read_photos(str(root))
    assert len(labelled.photos) == len(THINGS)  # `d`, whose txt is empty, among them
    assert labelled.told == [
        '1 photos have no labels and are left out (an empty txt says that a photo shows none of '
        "the things): 'images/new.jpg'"
    ]


def test_outlines_become_boxes_and_key_points_are_passed_over(tmp_path: Path) -> None:
    root = photos(tmp_path, 'images', THINGS[:1])
    write(root, {'labels/a.txt': '1 0.25 0.5 0.75 0.5 0.5 1.0\n', 'data.yaml': YAML})
    labelled = read_photos(str(root))
    assert boxes_of(labelled) == {'a': [('nut', [16.0, 24.0, 32.0, 24.0])]}
    assert labelled.told == ['1 outlines have become the upright boxes around them']
    write(root, {'data.yaml': YAML + 'kpt_shape: [1, 2]\n'})
    write(root, {'labels/a.txt': '1 0.5 0.5 0.5 0.5 0.1 0.1\n'})
    assert boxes_of(read_photos(str(root))) == {'a': [('nut', [16.0, 12.0, 32.0, 24.0])]}


def test_yolos_sizes_are_those_of_the_photo_as_it_is_shown(tmp_path: Path) -> None:
    root = yolo_apart(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new('RGB', (64, 48)).save(root / 'images/b.jpg', exif=exif)
    (photo,) = (p for p in read_photos(str(root)).photos if p.path.stem == 'b')
    assert photo.size == (48, 64)


def test_a_data_yaml_says_where_its_splits_are(tmp_path: Path) -> None:
    root = yolo_apart(tmp_path)
    write(root, {'val.txt': './images/a.jpg\nimages/c.jpg\n'})
    write(root, {'data.yaml': 'train: images\nval: val.txt\nnames: {0: bolt, 1: nut, 2: washer}\n'})
    # A photo of both is trained from; here the folder holds them all, as in coco128.
    assert len(read_photos(str(root)).split('val')) == 0
    write(root, {'data.yaml': 'val: val.txt\nnames: {0: bolt, 1: nut, 2: washer}\n'})
    assert [p.path.stem for p in read_photos(str(root)).split('val')] == ['a', 'c']


def test_the_devkits_lists_of_photos_are_splits(tmp_path: Path) -> None:
    root = photos(tmp_path, 'JPEGImages')
    write(root, {f'Annotations/{t.name}.xml': voc_xml(t) for t in THINGS})
    write(root, {'ImageSets/Main/val.txt': 'a\nc\n', 'ImageSets/Main/train.txt': 'b\n'})
    assert [p.path.stem for p in read_photos(str(root)).split('val')] == ['a', 'c']


def test_the_same_name_in_two_folders_finds_its_own_labels(tmp_path: Path) -> None:
    root = write(tmp_path, {'data.yaml': YAML})
    for folder, box in dict(train='0 .5 .5 .5 .5', valid='1 .5 .5 .5 .5').items():
        write_photo(root / folder / 'images/a.jpg', (64, 64))
        write(root, {f'{folder}/labels/a.txt': box})
    found = {p.split: [box.name for box in p.boxes] for p in read_photos(str(root)).photos}
    assert found == dict(train=['bolt'], val=['nut'])


# ------------------------------------------------------------------------------ splitting by chance


def test_a_split_is_the_same_every_time_and_has_every_class_on_both_sides() -> None:
    labelled = read_photos(str(real('cards')))
    train = labelled.split('train')
    chosen = take_off(train, seed=0)
    assert [p.path for p in chosen] == [p.path for p in take_off(train[::-1], seed=0)]
    assert {p.path for p in chosen} != {p.path for p in take_off(train, seed=1)}
    rest = [photo for photo in train if photo not in chosen]
    assert len(chosen) == 59
    assert set(count_boxes(chosen)) == set(count_boxes(rest)) == set(labelled.names)


def test_the_only_photo_of_a_class_is_trained_from(tmp_path: Path) -> None:
    labelled = read_photos(str(yolo_apart(tmp_path)))
    for seed in range(20):
        chosen = take_off(labelled.photos, seed, share=0.4)
        assert 'washer' not in count_boxes(chosen)
        assert {'bolt', 'nut'} <= set(count_boxes(chosen))
        rest = [photo for photo in labelled.photos if photo not in chosen]
        assert set(count_boxes(rest)) == set(NAMES)


def test_copies_of_a_photo_stay_on_one_side(tmp_path: Path) -> None:
    for number in range(6):
        for copy in 'xy':
            thing = Thing(f'{number}{copy}', (64, 64), [('bolt', (4, 4, 20, 20))])
            write_photo(tmp_path / f'{number}.jpg', (64, 64))
            write(tmp_path, {f'{thing.name}.xml': voc_xml(thing)})
            content = (tmp_path / f'{number}.jpg').read_bytes()
            (tmp_path / f'{thing.name}.jpg').write_bytes(content)
        (tmp_path / f'{number}.jpg').unlink()
    labelled = read_photos(str(tmp_path))
    for seed in range(5):
        chosen = [photo.path.stem for photo in take_off(labelled.photos, seed, share=0.4)]
        assert len(chosen) == 4
        assert {stem[0] + other for stem in chosen for other in 'xy'} == set(chosen)


# ----------------------------------------------------------------------------------------- mistakes


def two_formats(root: Path) -> Path:
    return write(yolo_apart(root), {'images/a.xml': voc_xml(THINGS[0])})


def no_labels(root: Path) -> Path:
    return photos(root, 'pictures')


def no_boxes(root: Path) -> Path:
    return write(photos(root, ''), {f'{t.name}.xml': voc_xml(t._replace(boxes=[])) for t in THINGS})


def changed(make: Callable[[Path], Path], **files: Any) -> Callable[[Path], Path]:
    """A layout with files in the place of others; `data__yaml` stands for data.yaml."""
    return lambda root: write(
        make(root), {name.replace('__', '.').replace('_of_', '/'): c for name, c in files.items()}
    )


def without_names(root: Path) -> Path:
    (yolo_apart(root) / 'data.yaml').unlink()
    return root


def ambiguous(root: Path) -> Path:
    write_photo(root / 'one/a.jpg', (64, 64))
    write_photo(root / 'two/a.jpg', (64, 64))
    return write(root, {'labels/a.xml': voc_xml(THINGS[0])})


MISTAKES = {
    'no such folder': (lambda root: root / 'gone', 'gone.: no such folder; give the folder that'),
    'no images': (
        lambda root: write(root, {'a.xml': '<a/>'}),
        r'holds no images .* but 1 \.xml file; give the',
    ),
    'no labels': (no_labels, r'holds 7 images and no labels in a format .*7 \.jpg files.*; export'),
    'no boxes': (no_boxes, r"7 images and not one labelled box in its Pascal VOC files \('a.xml'"),
    'two formats': (two_formats, r'in 2 formats, Pascal VOC \(.*\) and YOLO \(.*--format yolo'),
    'no data.yaml': (without_names, 'neither a data.yaml nor a classes.txt .*; write the names'),
    'no names': (changed(yolo_apart, data__yaml='nc: 3\n'), 'says names=None, .*; write them in'),
    'too few names': (changed(yolo_apart, data__yaml='names: [bolt]\n'),
                      'a.txt, line 2: class 1 is not among the 1 names of .*data.yaml; write its'),
    'a name twice': (changed(yolo_apart, data__yaml='names: [a, a, b]\n'), "two classes 'a'; give"),
    'no yaml': (changed(yolo_apart, data__yaml='names: [a\n'), 'is no yaml: .*; correct it'),
    'a line cut short': (changed(yolo_splits, train_of_labels_of_a__txt='0 .1 .1 .1 .1\n1 .5\n'),
                         "a.txt, line 2: '1 .5' is no label of YOLO .*; export"),
    'two yamls': (changed(yolo_apart, other__yaml=YAML), 'both look like a data.yaml; leave one'),
    'damaged xml': (changed(LAYOUTS['voc, apart'][0], Annotations_of_a__xml='<annotation>'),
                    'a.xml. is no xml that can be read .*; export it anew'),
    'a nameless object': (changed(LAYOUTS['voc, apart'][0],
                                  Annotations_of_a__xml='<annotation><object/></annotation>'),
                          'a.xml. holds an object without a name, .*; name it, or'),
    'an object without a box': (
        changed(
            LAYOUTS['voc, apart'][0],
            Annotations_of_a__xml='<annotation><object><name>nut</name></object></annotation>',
        ),
        "a.xml. holds an object 'nut' without a bndbox .*; export boxes",
    ),
    'any of two photos': (ambiguous, 'could be of .one/a.jpg. or of .two/a.jpg.; give every'),
    'two jsons of one photo': (changed(LAYOUTS['coco, apart'][0], b__json=coco(THINGS)),
                               'both list .*; leave one of the two files'),
    'an id of two photos': (changed(LAYOUTS['coco, apart'][0], annotations_of_all__json=dict(
        coco(THINGS), images=[dict(i, id=1) for i in coco(THINGS)['images']])),
        'all.json: 1 is the id of several images, .*; give every image'),
    'phrases': (changed(LAYOUTS['odvg'][0], train__jsonl='{"filename": "a", "grounding": {}}'),
                'line 1 has phrases of a caption .* gdino_lora_phrases'),
    'a label without a name': (changed(LAYOUTS['odvg'][0], label_map__json={}, train__jsonl=(
        odvg_lines(THINGS).replace('category', 'kind'))), 'label 0 without a name; put the label'),
}  # fmt: skip


@pytest.mark.parametrize('make, told', MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_told_in_one_sentence(
    make: Callable[[Path], Path], told: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        read_photos(str(make(tmp_path)))
    assert re.search(told, str(error.value)), error.value
    assert '\n' not in str(error.value)


def test_of_two_formats_one_may_be_asked_for(tmp_path: Path) -> None:
    root = str(two_formats(tmp_path))
    assert len(read_photos(root, 'yolo').photos) == 7
    with pytest.raises(ConfigError, match='no labels in the format odvg .*; it has voc and yolo'):
        read_photos(root, 'odvg')


def test_a_roboflow_project_of_its_classs_name_is_one_class(tmp_path: Path) -> None:
    root = roboflow(tmp_path)
    for path in root.rglob('*.json'):
        path.write_text(path.read_text().replace('screws', 'nut'))
    labelled = read_photos(str(root))
    assert sorted(labelled.names) == sorted(NAMES) and labelled.ids == {}
    assert 'renumbered from 1' in labelled.told[0]


@pytest.mark.parametrize(
    'names, code',
    [(['RBC', 'WBC', 'class_3', 'cls07', '0', '12', 'k7', 'x', 'Q-235', 'label 4'], True),
     (['red blood cell', 'tv', 'ace', 'CAT', 'Wheel Bolt', 'type b bolt', 'PC', '螺栓'], False)],
)  # fmt: skip
def test_codes_are_told_from_words(names: list[str], code: bool) -> None:
    assert [name for name in names if is_code(name) != code] == []

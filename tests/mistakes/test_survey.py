"""`check-dataset`: faults planted in right data are each found by name, and nothing else is said."""
# ruff: noqa: E501  a row of the table is a line

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import mmcv
import numpy as np
import pytest
from PIL import Image

from mmdet_gdino_lora.checks.alike import check_alike
from mmdet_gdino_lora.checks.images import look
from mmdet_gdino_lora.engine.survey import Surveyed, survey
from tests.mistakes.conftest import CLASSES, Case
from tests.photo_folders import real
from tests.tool_run import run_tool

ORIENTATION = 0x0112
#: What is cut short was filled in by OpenCV up to 4, and is refused since.
CUT = 'error' if int(cv2.__version__.partition('.')[0]) > 4 else 'warning'
Mistake = Callable[[Case], None]


def photo(case: Case, number: int = 0, stage: str = 'train') -> Path:
    return case.root / stage / f'{number}.jpg'


def surveyed(case: Case) -> list[Surveyed]:
    case.path.write_text(json.dumps(case.file))
    case.cfg.test_dataloader = case.cfg.val_dataloader
    return survey(case.cfg, bar=False)


def said(sets: list[Surveyed]) -> dict[str, str]:
    """Every sentence, and whether it is an error, a warning or a note."""
    result = {}
    for one in sets:
        result.update({f.sentence: 'error' if f.fatal else 'warning' for f in one.findings})
        result.update(dict.fromkeys(one.notes, 'note'))
    return result


# -------------------------------------------------------------------------------------------- faults


def saved(mode: str, ending: str = '.jpg', orientation: int = 1) -> Mistake:
    """The first image, saved in another mode or with an EXIF orientation."""

    def mistake(case: Case) -> None:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        image = Image.open(photo(case)).convert('RGB')
        if mode == 'RGBA':
            image.putalpha(Image.fromarray(np.tril(np.full((64, 64), 255, np.uint8))))
        case.file['images'][0]['file_name'] = f'0{ending}'
        image.convert(mode).save(photo(case).with_suffix(ending), exif=exif)

    return mistake


def deep(case: Case) -> None:
    case.file['images'][0]['file_name'] = '0.png'
    cv2.imwrite(str(case.root / 'train/0.png'), np.full((64, 64), 900, np.uint16))


def quarter(case: Case) -> None:
    """A photo on its side, whose boxes lie on it as its pixels do."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.open(photo(case)).resize((64, 48)).save(photo(case), exif=exif)
    case.file['images'][0]['height'] = 48
    # Of two images one would be half of them.
    for number in (2, 3):
        shutil.copy(photo(case, 1), photo(case, number))
        Image.open(photo(case, 1)).rotate(number).save(photo(case, number))
        case.file['images'].append(dict(id=number, file_name=f'{number}.jpg', width=64, height=64))
    for entry in case.file['annotations']:
        entry['bbox'] = [4, 4, 20, 24]
    boxes_for(case, 2, 3)


def boxes_for(case: Case, *images: int) -> None:
    for image in images:
        case.file['annotations'].append(
            dict(case.file['annotations'][0], id=900 + image, image_id=image, bbox=[9, 9, 30, 30])
        )


def box(*numbers: float) -> Mistake:
    def mistake(case: Case) -> None:
        case.file['annotations'][0].update(bbox=list(numbers), area=9)

    return mistake


def again(case: Case) -> None:
    case.file['annotations'].append(dict(case.file['annotations'][0], id=99))


def first(part: str, **fields: object) -> Mistake:
    return lambda case: case.file[part][0].update(fields)


def content(new: bytes) -> Mistake:
    return lambda case: photo(case).write_bytes(new) and None


def cut(case: Case) -> None:
    photo(case).write_bytes(photo(case).read_bytes()[:-300])


def gaps(case: Case) -> None:
    for part, key in dict(categories='id', annotations='category_id').items():
        for entry in case.file[part]:
            entry[key] *= 7


def without(name: str, stage: str) -> Mistake:
    """A class that loses its boxes."""

    def mistake(case: Case) -> None:
        number = CLASSES.index(name) + 1
        if stage == 'train':
            kept = [a for a in case.file['annotations'] if a['category_id'] != number]
            case.file['annotations'] = kept
        else:
            path = case.root / 'annotations/val.json'
            file = json.loads(path.read_text())
            file['annotations'] = [a for a in file['annotations'] if a['category_id'] != number]
            path.write_text(json.dumps(file))

    return mistake


def named(*names: str) -> Mistake:
    """Other class names, in both files and the config."""

    def mistake(case: Case) -> None:
        path = case.root / 'annotations/val.json'
        val = json.loads(path.read_text())
        for file in (case.file, val):
            file['categories'] = [dict(id=i, name=n) for i, n in enumerate(names, 1)]
            for place, entry in enumerate(file['annotations']):
                entry['category_id'] = place % len(names) + 1
            start = len(file['annotations'])
            for number in range(start, len(names)):
                entry = dict(file['annotations'][0], id=500 + number, category_id=number + 1)
                file['annotations'].append(dict(entry, bbox=[number % 30, 5, 20, 20]))
        path.write_text(json.dumps(val))
        for loader in (case.cfg.train_dataloader, case.cfg.val_dataloader):
            loader.dataset.metainfo.classes = names

    return mistake


def emptied(case: Case) -> None:
    case.file['annotations'] = [a for a in case.file['annotations'] if a['image_id'] == 0]


def in_both(case: Case) -> None:
    shutil.copy(photo(case), photo(case, 0, 'val'))


def twice(case: Case) -> None:
    shutil.copy(photo(case), photo(case, 1))


#: Fault: what plants it, what is said, and how grave it is.
FAULTS: dict[str, tuple[Mistake, str, str]] = {
    'missing image': (lambda case: photo(case).unlink(), '1 of 2 images can not be read.*train/0.jpg, which is not there', 'error'),
    'zero bytes': (content(b''), '1 of 2 images can not be read.*train/0.jpg, which is empty', 'error'),
    'unreadable image': (content(b'no image at all'), 'train/0.jpg, which is damaged or no image', 'error'),
    'web page': (content(b'<html></html>'), 'train/0.jpg, which is a web page', 'error'),
    'truncated image': (cut, '1 of 2 images (end early, and OpenCV fills in|can not be read).*train/0.jpg', CUT),
    '16 bits': (deep, '1 of 2 images have 16 bits per channel.*loader keeps the upper 8.*train/0.png', 'warning'),
    'CMYK': (saved('CMYK'), '1 of 2 images are CMYK.*train/0.jpg', 'warning'),
    'transparency': (saved('RGBA', '.png'), '1 of 2 images have transparent places.*train/0.png', 'warning'),
    'upside down by EXIF': (saved('RGB', orientation=3), '1 of 2 images are mirrored or upside down until they are loaded.*train/0.jpg', 'warning'),
    'a quarter by EXIF': (quarter, '1 of 4 images are turned by a quarter when they are loaded.*train/0.jpg, 64 x 48 in the file, 48 x 64', 'warning'),
    'another size': (first('images', width=90, height=90), '1 of 2 images have another size than the file says.*train/0.jpg, 90 x 90', 'error'),
    'no area': (box(4, 4, 0, 20), '1 of 6 boxes have a width or height of 0 or less: mmdet drops them.*0.jpg, annotation', 'warning'),
    'thinner than a pixel': (box(4, 4, 0.4, 20), '1 of 6 boxes are thinner than a pixel: mmdet drops.*0.jpg', 'warning'),
    'outside': (box(200, 4, 9, 9), '1 of 6 boxes lie outside of their image: mmdet drops.*0.jpg', 'warning'),
    'reaching out': (box(40, 4, 60, 9), '1 of 6 boxes reach more than 2 pixels out.*0.jpg', 'warning'),
    'NaN': (box(4, math.nan, 9, 9), '1 of 6 boxes hold NaN or infinity: mmdet drops.*0.jpg', 'warning'),
    'three numbers': (box(4, 4, 9), '1 of 6 boxes have no bbox of four numbers.*0.jpg', 'error'),
    'the same box twice': (again, '1 of 7 boxes are the same box of the same class once more.*find such things twice.*0.jpg, annotation 99', 'warning'),
    'category ids with gaps': (gaps, r'category ids are not 1, 2, 3, ... \(7 to 21\); mmdet numbers labels 0 to 2', 'note'),
    'an unknown category': (first('annotations', category_id=77), "1 of 6 boxes have a category_id that is not among.*0.jpg", 'warning'),
    'an unknown image': (first('annotations', image_id=77), '1 of 6 boxes have an image_id that is not among.*first: image_id 77', 'warning'),
    'an image id twice': (first('images', id=1), "1 of 2 images have the id of another.*id 1 of '0.jpg' and of '1.jpg'", 'error'),
    'an annotation id twice': (first('annotations', id=2), '1 of 6 annotations have the id of another, which mmdet refuses', 'error'),
    'a class without boxes in train': (without('hot star', 'train'), r"train.*1 of 3 classes \('hot star'\) have no box in .*train.json.*unlearns", 'warning'),
    'a class without boxes in val': (without('hot star', 'val'), r"val.*1 of 3 classes \('hot star'\) have no box in .*val.json.*no AP", 'warning'),
    'names nearly the same': (named('red circle', 'Red Circles', 'blue dog'), "1 pairs of names are nearly the same.*'red circle' and 'Red Circles'", 'warning'),
    'names of the same tokens': (named('red circle', 'RED circle', 'blue dog'), 'become the same tokens as another', 'error'),
    'too many tokens': (named(*(f'{a} {b} {c}' for a in ('red', 'blue', 'hot') for b in ('dog', 'cat', 'star', 'circle', 'red', 'blue') for c in ('dog', 'star', 'circle', 'cat'))), 'a caption of all 72 names takes .* tokens, more than max_tokens=256', 'error'),
    'an image without boxes': (emptied, '1 of 2 images have no box, and all in them is learned as background; first: 1.jpg', 'note'),
    'an image in train and val': (in_both, '1 of 2 images are trained from, too.*val/0.jpg, which is .*train/0.jpg', 'warning'),
    'an image twice': (twice, '1 of 2 images are copies of another.*train/1.jpg, which is .*train/0.jpg', 'warning'),
    'no annotation file': (lambda case: case.cfg.train_dataloader.dataset.update(ann_file='gone.json'), "ann_file='gone.json': no such file", 'error'),
}  # fmt: skip
#: What comes of a fault besides.
ALSO = {
    'an unknown image': '1 of 2 images have no box',
    'an image id twice': 'no box|same box|not among',
    'names of the same tokens': 'nearly the same',
    'too many tokens': 'nearly the same|filter|same tokens',
    'another size': 'reach',
}


def test_nothing_is_said_of_right_data(case: Case) -> None:
    assert said(surveyed(case)) == {}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_found_by_name(case: Case, fault: str) -> None:
    mistake, told, kind = FAULTS[fault]
    mistake(case)
    found = said(surveyed(case))
    about = {sentence: grave for sentence, grave in found.items() if re.search(told, sentence)}
    assert list(about.values()) == [kind], found
    rest = [sentence for sentence in found if sentence not in about]
    assert [s for s in rest if not re.search(ALSO.get(fault, '^$'), s)] == []


def test_faults_that_would_end_a_run_do_not_hide_others(case: Case) -> None:
    planted = ['three numbers', 'no area', 'an annotation id twice', 'a class without boxes in val']
    planted += ['an image in train and val', 'truncated image']
    again(case)
    case.file['annotations'][1]['bbox'] = [4, 4, 0, 20]
    case.file['annotations'][2]['bbox'] = [4, 4, 9]
    case.file['annotations'].append(dict(case.file['annotations'][4], bbox=[9, 9, 9, 9]))
    case.file['images'].append(dict(file_name='gone.jpg'))
    cut(case)
    in_both(case)
    FAULTS['a class without boxes in val'][0](case)
    found = '\n'.join(said(surveyed(case)))
    assert "1 of 3 images have no usable 'id'" in found
    for fault in planted:
        assert re.search(FAULTS[fault][1].replace('of 6', r'of \d'), found), (fault, found)


# ---------------------------------------------------------------------------------- what isn't said


@pytest.mark.parametrize('name', ['raccoon', 'cards', 'coco_tiny'])
def test_nothing_untrue_is_said_of_real_photos(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run_tool(f'python tools/new_config.py {real(name)} --base shapes', tmp_path)
    run_tool('python tools/check_dataset.py my_things.py', tmp_path)
    told = re.sub(r'\(?first: .*', '', capsys.readouterr().out)
    assert '0 errors' in told
    about = re.findall('^(?:warning|note): (.*)', told, flags=re.M)
    true = ['fall into single letters']  # of the drawn shapes' vocabulary
    true += {
        'raccoon': ['are copies of another'],  # raccoon-11.jpg is raccoon-116.jpg, to the byte
        'cards': [],
        'coco_tiny': ['have no box', 'category ids are not 1, 2, 3', 'are crowds'],
    }[name]
    assert [s for s in about if not any(part in s for part in true)] == []
    if name == 'raccoon':
        folder = real(name) / 'images'
        one, other = (folder / f'raccoon-{n}.jpg' for n in (11, 116))
        assert one.read_bytes() == other.read_bytes()


def test_names_that_are_meant_to_differ_are_not_alike() -> None:
    names = ['lane 1', 'lane 2', 'type a', 'type b', 'cat', 'car', 'dog', 'hot dog', 'ace', 'axe']
    names += ['blue cat bolt', 'blue car bolt']
    assert check_alike('train', names) == []
    (found,) = check_alike('train', ['racoon', 'raccoon', 'wheel-bolt', 'wheel_bolt', 'wolf'])
    assert found.cases == ("'racoon' and 'raccoon'", "'wheel-bolt' and 'wheel_bolt'")


@pytest.mark.parametrize('ending', ['.jpg', '.png', '.webp', '.tif'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_an_orientation_is_what_opencv_makes_of_it(
    ending: str, orientation: int, tmp_path: Path
) -> None:
    corner = Image.new('RGB', (32, 16))
    corner.paste((255, 255, 255), (0, 0, 8, 4))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = tmp_path / f'a{ending}'
    corner.save(path, exif=exif)
    pixels = mmcv.imfrombytes(path.read_bytes(), flag='color')  # as the loader does
    seen = look(str(path))
    loaded = seen.size[::-1] if seen.turned else seen.size
    assert loaded == pixels.shape[1::-1]
    is_as_it_lies = pixels.shape[:2] == (16, 32) and pixels[1, 1].min() > 128
    assert is_as_it_lies == (loaded == (32, 16) and not seen.moved)


def test_an_alpha_channel_that_hides_nothing_is_not_told(tmp_path: Path) -> None:
    Image.new('RGBA', (8, 8), (9, 9, 9, 255)).save(tmp_path / 'a.png')
    assert not look(str(tmp_path / 'a.png')).clear


# ------------------------------------------------------------------------------------- the command


def test_the_command_prints_a_table_and_ends_with_a_status(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    case.cfg.test_dataloader = case.cfg.val_dataloader
    case.cfg.dump(tmp_path / 'right.py')
    run_tool('python tools/check_dataset.py right.py', tmp_path)
    out = capsys.readouterr().out
    assert re.search(r'train_dataloader.dataset +2 +6 +3 +0 +0\n', out)
    assert re.search(r'hot star +2 +2 +\d+\n', out)
    assert re.search(r'a caption of all names: \d+ tokens of 256', out)
    assert out.endswith('0 errors, 0 warnings: a run can begin\n')
    for number in range(6):
        case.file['annotations'][number]['bbox'][2] = 0 if number else 20
    case.path.write_text(json.dumps(case.file))
    run_tool('python tools/check_dataset.py right.py', tmp_path)
    out = capsys.readouterr().out
    assert '5 of 6 boxes have a width or height of 0' in out and 'more (--all)' not in out
    for option in ('--strict', '--cfg-options train_dataloader.dataset.data_prefix.img=gone/'):
        with pytest.raises(SystemExit) as end:
            run_tool(f'python tools/check_dataset.py right.py {option}', tmp_path)
        assert end.value.code == 1
    assert 'error: train_dataloader.dataset.data_prefix.img=' in capsys.readouterr().out

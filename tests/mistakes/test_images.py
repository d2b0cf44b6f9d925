"""Images that no loader could read, or that are loaded otherwise than meant."""
# ruff: noqa: E501  a row of the table is a line

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Callable

import cv2
import mmcv
import numpy as np
import pytest
from PIL import Image

from tests.mistakes.conftest import Case

STOPS, GOES_ON = True, False
NOISE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def photo(case: Case) -> Path:
    return case.root / 'train/0.jpg'


def cut(case: Case) -> None:
    content = photo(case).read_bytes()
    photo(case).write_bytes(content[: len(content) // 2])


def png_cut(case: Case) -> None:
    written(NOISE, '.png')(case)
    path = case.root / 'train/0.png'
    path.write_bytes(path.read_bytes()[:-200])


def written(pixels: np.ndarray, ending: str = '.jpg') -> Callable[[Case], None]:
    """Writes the first image anew, in another format or size; the file still says 64 x 64."""

    def mistake(case: Case) -> None:
        case.file['images'][0]['file_name'] = f'0{ending}'
        assert cv2.imwrite(str(case.root / f'train/0{ending}'), pixels)

    return mistake


def sized(width: int, height: int, listed: tuple[int, int], images: int) -> Callable[[Case], None]:
    """Images of one size that the file lists with another."""

    def mistake(case: Case) -> None:
        for entry in case.file['images'][:images]:
            cv2.imwrite(
                str(case.root / 'train' / entry['file_name']), np.resize(NOISE, (height, width, 3))
            )
            entry.update(width=listed[0], height=listed[1])

    return mistake


def turned(case: Case) -> None:
    """A camera's photo on its side, annotated as its pixels lie."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(np.resize(NOISE, (40, 64, 3))).save(photo(case), exif=exif)
    case.file['images'][0].update(width=64, height=40)
    for entry in case.file['annotations']:
        entry['bbox'] = [4, 4, 20, 20]


def many(mistake: Callable[[Case], None], images: int = 8) -> Callable[[Case], None]:
    """The mistake in the first of many images."""

    def result(case: Case) -> None:
        for number in range(2, images):
            name = f'{number}.jpg'
            (case.root / 'train' / name).write_bytes(photo(case).read_bytes())
            case.file['images'].append(dict(case.file['images'][0], id=number, file_name=name))
        mistake(case)

    return result


def passed_over(case: Case) -> None:
    photo(case).unlink()
    case.data.pipeline[0].ignore_empty = True


def in_another_folder(case: Case) -> None:
    case.data.data_prefix.img = 'annotations/'


def in_val(case: Case) -> None:
    (case.root / 'val/1.jpg').unlink()


#: As in test_data.py; the image is one of 2 or, where boxes lie, of 8.
TABLE = {
    'missing': (lambda case: photo(case).unlink(), 'FILE...1 of 2 images can not be read, and the run would stop...1 not there...data_prefix.img...train/0.jpg, which is not there', STOPS),
    'all missing': (in_another_folder, '2 of 2 images can not be read...annotations/0.jpg', STOPS),
    'missing in val': (in_val, 'val_dataloader.dataset.ann_file=...1 of 2 images can not be read...val/1.jpg', STOPS),
    'zero bytes': (lambda case: photo(case).write_bytes(b''), 'train/0.jpg, which is empty', STOPS),
    'web page': (lambda case: photo(case).write_bytes(b'\n<!DOCTYPE html><html>404</html>'), 'train/0.jpg, which is a web page', STOPS),
    'text': (lambda case: photo(case).write_bytes(b'no image'), 'train/0.jpg, which is damaged or no image', STOPS),
    'missing, with a tolerant loader': (passed_over, '1 of 2 images can not be read, and the pipeline (ignore_empty=True) passes over them', GOES_ON),
    '16 bits': (written(NOISE.astype(np.uint16) * 16, '.png'), '1 of 2 images have 16 bits per channel...upper 8...convert them to 8 bits...train/0.png', GOES_ON),
    '16 bits, grey': (written(NOISE[..., 0].astype(np.uint16) * 16, '.tif'), '1 of 2 images have 16 bits per channel...train/0.tif', GOES_ON),
    'size exchanged in one': (many(sized(64, 50, (50, 64), 1)), '1 of 8 images have width and height exchanged in the file...train/0.jpg, 50 x 64 in the file, 64 x 50 when loaded', GOES_ON),
    'size exchanged in all': (sized(64, 50, (50, 64), 2), '2 of 2 images have width and height exchanged', STOPS),
    'another size in one': (many(sized(32, 32, (64, 64), 1)), '1 of 8 images have another size than the file says...64 x 64 in the file, 32 x 32 when loaded', GOES_ON),
    'another size in all': (sized(32, 32, (64, 64), 2), '2 of 2 images have another size...use the images that were annotated', STOPS),
    'turned by EXIF': (many(turned), '1 of 8 images are turned by a quarter when they are loaded (their EXIF orientation)...64 x 40 in the file, 40 x 64 when loaded', GOES_ON),
}  # fmt: skip


@pytest.mark.parametrize('mistake, sentence, stops', TABLE.values(), ids=list(TABLE))
def test_a_mistake_in_the_images_is_told_in_one_sentence(
    case: Case, mistake: Callable[[Case], Any], sentence: str, stops: bool
) -> None:
    mistake(case)
    case.expect(sentence, stops)


@pytest.mark.parametrize('mistake', [cut, png_cut], ids=['jpg', 'png'])
def test_a_truncated_image_is_told_as_opencv_takes_it(case: Case, mistake: Any) -> None:
    mistake(case)
    name = str(case.root / 'train' / case.file['images'][0]['file_name'])
    pixels = mmcv.imfrombytes(Path(name).read_bytes(), flag='color')
    if pixels is None:  # from OpenCV 5 on
        case.expect(f'1 of 2 images can not be read...first: {name}, which is damaged', STOPS)
    else:
        case.expect(f'1 of 2 images end early, and OpenCV fills in...first: {name}', GOES_ON)


@pytest.mark.parametrize('ending', ['.jpg', '.png', '.bmp', '.webp', '.tif'])
def test_nothing_is_said_of_whole_images_of_any_format(case: Case, ending: str) -> None:
    written(NOISE, ending)(case)
    assert case.check() == ([], None)


def test_bytes_behind_an_image_do_no_harm(case: Case) -> None:
    photo(case).write_bytes(photo(case).read_bytes() + b'phone' * 9)
    assert case.check() == ([], None)


def test_a_turned_image_that_was_annotated_as_shown_is_right(case: Case) -> None:
    turned(case)
    case.file['images'][0].update(width=40, height=64)
    assert case.check() == ([], None)


def test_images_that_training_never_reads_are_not_looked_at(case: Case) -> None:
    case.file['images'].append(dict(id=7, file_name='gone.jpg', width=64, height=64))
    case.data.filter_cfg = dict(filter_empty_gt=True, min_size=1)
    assert case.check() == ([], None)
    case.data.filter_cfg = dict(filter_empty_gt=False, min_size=1)
    case.expect('1 of 3 images can not be read...gone.jpg', STOPS)
    case.data.indices = 2
    assert case.check() == ([], None)


def test_images_in_a_store_are_left_alone(case: Case) -> None:
    photo(case).unlink()
    step = copy.deepcopy(case.data.pipeline[0])
    case.data.pipeline[0].backend_args = dict(backend='petrel')
    assert case.check() == ([], None)
    case.data.pipeline[0] = step
    assert case.check()[1] is not None

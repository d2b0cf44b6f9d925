"""Pictures of what the model will see: augmentation, boxes, and the caption's own tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmengine.config import Config
from PIL import Image

from mmdet_gdino_lora.browse.picture import GAP, PAD, colour, draw, laid_out
from mmdet_gdino_lora.browse.views import Token, View, Views
from mmdet_gdino_lora.errors import ConfigError
from tests.tool_run import run_typed, write_data

CLASSES = ('dog', 'hot dog', 'wheel')
META = ('img_path', 'scale_factor', 'text', 'tokens_positive', 'caption_tokens')
FLIP = dict(type='RandomFlip', prob=1.0)
NORMALISE = dict(type='Normalize', mean=[100.0, 110, 120], std=[50.0, 60, 70], to_rgb=True)
Configured = Callable[..., Config]


@TRANSFORMS.register_module()
class MovedSpans(BaseTransform):
    """Gives the first class the last one's tokens, as no search in the caption would."""

    def transform(self, results: dict) -> dict:
        caption = results['caption_tokens']
        spans = (caption.token_spans[-1], *caption.token_spans[1:])
        results['caption_tokens'] = type(caption)(**{**vars(caption), 'token_spans': spans})
        return results


@pytest.fixture
def configured(text_dir: str, tmp_path: Path) -> Configured:
    """Makes a config on two images with a box of each class: steps come ahead of TokenSpans."""
    write_data(tmp_path, CLASSES, ['train', 'val'])

    def configure(*steps: dict, behind: tuple[dict, ...] = (), spans: bool = True) -> Config:
        loads = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True)]
        words = [dict(type='TokenSpans', tokenizer_name=text_dir)] if spans else []
        packs = dict(type='PackDetInputs', meta_keys=META)

        def loader(split: str, pipeline: list) -> dict:
            dataset = dict(
                type='CocoDataset',
                data_root=f'{tmp_path}/',
                ann_file=f'annotations/{split}.json',
                data_prefix=dict(img=f'{split}/'),
                metainfo=dict(classes=CLASSES),
                return_classes=True,
                pipeline=pipeline,
            )
            return dict(batch_size=1, dataset=dataset)

        train = [*loads, *steps, *words, *behind, packs]
        resized = [loads[0], dict(type='Resize', scale=(128, 128)), loads[1], *words, packs]
        cfg = Config(
            dict(
                default_scope='mmdet',
                custom_imports=dict(imports=['mmdet_gdino_lora']),
                model=dict(language_model=dict(name=text_dir)),
                train_dataloader=loader('train', train),
                val_dataloader=loader('val', resized),
            )
        )
        cfg.dump(tmp_path / 'looked_at.py')
        return cfg

    return configure


def in_file(path: Path, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """An image's pixels, RGB, and its boxes, as the files have them."""
    content = json.loads((path / f'annotations/{split}.json').read_text())
    boxes = [a['bbox'] for a in content['annotations'] if a['image_id'] == index]
    corners = [(x, y, x + w, y + h) for x, y, w, h in boxes]
    image = cv2.imread(str(path / split / f'{index}.jpg'))
    return image[..., ::-1], np.array(corners, dtype=float)


def tokens_of(view: View, label: int) -> list[str]:
    (caption,) = view.captions
    return [token.text for token in caption if label in token.labels]


# ------------------------------------------------------------------------------------------- views


def test_the_view_is_what_the_pipeline_hands_over(configured: Configured, tmp_path: Path) -> None:
    image, boxes = in_file(tmp_path, 'train', 1)
    plain, flipped = (Views(configured(*s), 'train').view(1, 0) for s in ((), (FLIP,)))
    assert np.array_equal(plain.image, image) and np.array_equal(plain.boxes, boxes)
    assert np.array_equal(flipped.image, image[:, ::-1])
    mirrored = [64, 0, 64, 0] + boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1]
    assert np.array_equal(flipped.boxes, mirrored)
    assert plain.labels.tolist() == [0, 1, 2] and plain.path.endswith('train/1.jpg')


def test_normalising_is_undone_where_the_pipeline_did_it(
    configured: Configured, tmp_path: Path
) -> None:
    image, _ = in_file(tmp_path, 'train', 0)
    maybe = dict(type='RandomApply', transforms=[NORMALISE], prob=0.5)
    views = Views(configured(maybe), 'train')
    packed = {views._dataset[0]['inputs'].is_floating_point() for _ in range(20)}
    assert packed == {True, False}
    for draw_number in range(6):
        shown = views.view(0, 0, draw_number).image
        assert np.abs(shown.astype(int) - image).max() <= 1


def test_boxes_behind_the_resizing_are_moved_with_the_image(
    configured: Configured, tmp_path: Path
) -> None:
    view = Views(configured(), 'val').view(0, 0)
    assert view.image.shape == (128, 128, 3)
    assert np.array_equal(view.boxes, 2 * in_file(tmp_path, 'val', 0)[1])


def test_tokens_are_the_tokenizers_and_their_classes_the_samples(configured: Configured) -> None:
    view = Views(configured(), 'train').view(0, 0)
    (caption,) = view.captions
    spelt = ['w', '##h', '##e', '##e', '##l']
    assert [t.text for t in caption] == [
        '[CLS]',
        'dog',
        '.',
        'hot',
        'dog',
        '.',
        *spelt,
        '.',
        '[SEP]',
    ]
    assert [tokens_of(view, label) for label in range(3)] == [['dog'], ['hot', 'dog'], spelt]
    moved = Views(configured(behind=(dict(type='MovedSpans'),)), 'train').view(0, 0)
    assert [tokens_of(moved, label) for label in range(3)] == [spelt, ['hot', 'dog'], spelt]


@pytest.mark.parametrize('split', ['train', 'val'])
def test_without_token_spans_the_caption_is_the_detectors(
    configured: Configured, split: str
) -> None:
    ours, stock = (Views(configured(spans=given), split).view(0, 0) for given in (True, False))
    assert ours.captions == stock.captions and ours.names == stock.names


def test_a_draw_is_its_seeds_and_numbers(configured: Configured) -> None:
    brightness = dict(type='PhotoMetricDistortion')
    views = Views(configured(brightness), 'train')
    first = views.view(0, 0, 1).image
    views.view(1, 0, 0)
    assert np.array_equal(views.view(0, 0, 1).image, first)
    others = [views.view(0, 0, 0).image, views.view(0, 1, 1).image]
    assert not any(np.array_equal(other, first) for other in others)


# ---------------------------------------------------------------------------------------- pictures


def seen(labels: list[int], captions: tuple, size: int = 640, ignored: bool = False) -> View:
    boxes = np.array([[40 + 120 * n, 300, 140 + 120 * n, 400] for n in range(len(labels))], float)
    names = {label: f'thing {label}' for label in range(40)}
    image = np.full((size, size, 3), 128, np.uint8)
    flags = np.full(len(labels), ignored)
    return View('a.jpg', image, boxes, np.array(labels, int), flags, names, captions)


def test_tokens_have_the_colour_of_their_boxes() -> None:
    caption = (Token('[CLS]', ()), Token('hot', (1,)), Token('dog', (1, 3)), Token('.', ()))
    view = seen([3, 1], (caption,))
    picture = np.asarray(draw(view))
    for (x1, y1, x2, y2), label in zip(view.boxes.astype(int), [3, 1]):
        corners = [picture[y, x].tolist() for x, y in ((x1, y1 + 60), (x2, y1 + 60), (x1 + 50, y2))]
        assert corners == [list(colour(label))] * 3
    none, hot, dog, dot = laid_out(caption, 640)
    top = 640 + GAP + 1

    def at(x: int) -> list[int]:
        return picture[top, x].tolist()

    assert at(none.x + 1) == at(dot.x + 1) == [255] * 3
    assert at(hot.x + 1) == at(hot.x + hot.width - 2) == at(dog.x + 1) == list(colour(1))
    assert at(dog.x + dog.width - 2) == list(colour(3))


def test_classes_differ_in_colour_and_ink_shows_on_all() -> None:
    colours = np.array([colour(label) for label in range(16)]) / 255
    assert np.abs(colours[:, None] - colours).max(-1)[~np.eye(16, dtype=bool)].min() > 0.06
    linear = ((colours + 0.055) / 1.055) ** 2.4
    assert ((linear @ [0.2126, 0.7152, 0.0722] + 0.05) / 0.058).min() > 4.5  # WCAG's, on the ink


def test_numbers_and_names_say_what_colours_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdet_gdino_lora.browse import picture

    written: list[str] = []
    real = picture.ImageDraw.ImageDraw.text
    monkeypatch.setattr(
        picture.ImageDraw.ImageDraw,
        'text',
        lambda self, xy, text, *more: (written.append(text), real(self, xy, text, *more))[1],
    )
    draw(seen([3, 1], ((Token('hot', (1,)), Token('dog', (1, 3))),)))
    assert written == ['3 thing 3', '1 thing 1', 'hot', '1', 'dog', '1 3']
    written.clear()
    draw(seen([3], ((Token('dog', (3,)),),), ignored=True))
    assert written[0] == '3 thing 3 (ignored)'


def test_long_captions_wrap_and_stay_within_the_picture() -> None:
    caption = tuple(Token(f'word{n}', (n,)) for n in range(40))
    cells = list(laid_out(caption, 640))
    assert [cell.token for cell in cells] == list(caption)
    assert len({cell.y for cell in cells}) > 3
    assert all(c.x >= GAP and c.x + c.width + GAP <= 640 and c.width > 2 * PAD for c in cells)
    for one, next_one in zip(cells, cells[1:]):
        assert next_one.y > one.y or next_one.x >= one.x + one.width
    picture = np.asarray(draw(seen([], (caption, caption))))
    lowest = 640 + GAP + cells[-1].y  # the second caption comes below the first
    assert len(picture) > lowest + cells[-1].y and picture.shape[1] == 640
    assert (picture[-10:] == 255).all() and not (picture[lowest] == 255).all()


def test_small_images_are_enlarged_whole(configured: Configured, tmp_path: Path) -> None:
    view = Views(configured(), 'train').view(0, 0)
    picture = np.asarray(draw(view))
    assert picture.shape[1] == 640
    free = np.ones((64, 64), bool)
    for x1, y1, x2, y2 in view.boxes.astype(int):
        free[max(0, y1 - 4) : y2 + 4, max(0, x1 - 2) : x2 + 14] = False
    assert free.sum() > 500
    assert np.array_equal(picture[5:640:10, 5::10][free], view.image[free])


# ------------------------------------------------------------------------------------ the command


def test_the_command_writes_pictures_and_a_page(configured: Configured, tmp_path: Path) -> None:
    configured(dict(type='PhotoMetricDistortion'))
    command = 'gdino-lora browse-dataset looked_at.py --number 9 --repeat 2'
    run_typed(f'{command} -o one', tmp_path)
    run_typed(f'{command} -o two', tmp_path)
    run_typed(f'{command} -o other --seed 1', tmp_path)
    names = ['000_0.jpg', '001_0.jpg', '002_1.jpg', '003_1.jpg']
    assert sorted(path.name for path in (tmp_path / 'one').iterdir()) == [*names, 'index.html']
    page = (tmp_path / 'one/index.html').read_text()
    assert [page.count(f'src="{name}"') for name in names] == [1] * 4
    assert '1 dog, 1 hot dog, 1 wheel' in page and '[CLS] dog . hot dog . w ##h' in page
    assert 'http' not in page
    bytes_of: dict[str, Any] = {
        folder: [(tmp_path / folder / name).read_bytes() for name in names]
        for folder in ('one', 'two', 'other')
    }
    assert bytes_of['one'] == bytes_of['two'] != bytes_of['other']
    assert len(set(bytes_of['one'])) == 4
    assert Image.open(tmp_path / 'one' / names[0]).width == 640


def test_names_of_files_and_classes_are_no_html(configured: Configured, tmp_path: Path) -> None:
    cfg = configured(spans=False)
    content = json.loads((tmp_path / 'annotations/train.json').read_text())
    (tmp_path / 'train/0.jpg').rename(tmp_path / 'train/<b> #1.jpg')
    content['images'][0]['file_name'] = '<b> #1.jpg'
    content['categories'][0]['name'] = 'dog <script>'
    (tmp_path / 'annotations/train.json').write_text(json.dumps(content))
    cfg.train_dataloader.dataset.metainfo.classes = ('dog <script>', *CLASSES[1:])
    cfg.dump(tmp_path / 'looked_at.py')
    run_typed('gdino-lora browse-dataset looked_at.py -o out', tmp_path)
    page = (tmp_path / 'out/index.html').read_text()
    assert '<script' not in page and '<b> ' not in page
    assert 'src="000_%3Cb%3E%20%231.jpg"' in page and (tmp_path / 'out/000_<b> #1.jpg').is_file()


@pytest.mark.parametrize(
    ('more', 'told'),
    [
        ('--split test', '^test_dataloader is not set'),
        ('--number 0', '^--number 0: give'),
        ('--seed -1', '^--seed -1: give'),
        (
            '--cfg-options train_dataloader.dataset.ann_file=annotations/gone.json',
            r"^train_dataloader.dataset.ann_file='annotations/gone.json': no such file",
        ),
        (
            '--cfg-options train_dataloader.dataset.metainfo.classes=[cat]',
            '^train_dataloader.dataset.metainfo.classes: none among the categories',
        ),
    ],
)
def test_a_mistake_is_one_sentence(
    configured: Configured, tmp_path: Path, more: str, told: str, capsys: pytest.CaptureFixture
) -> None:
    configured()
    with pytest.raises(SystemExit) as end:
        run_typed(f'gdino-lora browse-dataset looked_at.py -o out {more}', tmp_path)
    error = capsys.readouterr().err.splitlines()[-1].removeprefix('error: ')
    assert end.value.code == 2 and re.search(told, error)
    assert not (tmp_path / 'out').exists()


def test_an_image_that_is_gone_is_named(configured: Configured, tmp_path: Path) -> None:
    views = Views(configured(), 'train')
    (tmp_path / 'train/1.jpg').unlink()
    with pytest.raises(ConfigError, match=r"train_dataloader.dataset: the image '.*train/1.jpg'"):
        views.view(1, 0)

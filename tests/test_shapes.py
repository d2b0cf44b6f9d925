"""The data set that the project draws itself, and the configs and text model that go with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config
from transformers import AutoTokenizer

from mmdet_gdino_lora.datasets import shapes
from mmdet_gdino_lora.datasets.shapes import (
    BASE_CLASSES,
    IMAGE_SIZE,
    NEW_CLASSES,
    Split,
    draw_image,
    write_shapes,
)

ROOT = Path(__file__).parent.parent
FEW = {'base_val': Split(BASE_CLASSES, 6), 'new_val': Split(NEW_CLASSES, 4)}


def config(name: str) -> Config:
    return Config.fromfile(ROOT / 'configs' / name)


def files(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob('*') if p.is_file()}


def test_an_image_depends_on_its_generator_alone():
    first, again = (draw_image(np.random.default_rng(7), BASE_CLASSES) for _ in range(2))
    for one, other in zip(first, again):
        np.testing.assert_array_equal(one, other)
    different = draw_image(np.random.default_rng(8), BASE_CLASSES)
    assert not np.array_equal(first[0], different[0])


@pytest.mark.parametrize('classes', [BASE_CLASSES, NEW_CLASSES])
def test_boxes_lie_in_the_image_and_labels_among_the_classes(classes):
    seen = set()
    for seed in range(40):
        image, boxes, labels = draw_image(np.random.default_rng(seed), classes)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8
        assert 1 <= len(boxes) == len(labels) <= 6
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2:] >= 8).all()
        assert (boxes[:, :2] + boxes[:, 2:] <= IMAGE_SIZE).all()
        seen.update(labels.tolist())
    assert seen == set(range(len(classes)))


def test_a_box_bounds_the_shape_that_was_painted():
    # On a black background the painted pixels' extent is the box, give or take antialiasing.
    rng = np.random.default_rng(0)
    for shape in (*shapes.BASE_SHAPES, *shapes.NEW_SHAPES):
        corners = shapes.outline(shape) * 30 + IMAGE_SIZE / 2
        image = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.float32)
        shapes._paint(rng, image, corners, np.full(3, 255.0))
        rows, columns = np.nonzero(image.max(-1) > 100)
        low, high = corners.min(0), corners.max(0)
        np.testing.assert_allclose([columns.min(), rows.min()], low, atol=1.5)
        np.testing.assert_allclose([columns.max() + 1, rows.max() + 1], high, atol=1.5)


def test_new_classes_share_no_word_with_base_classes():
    def words(names):
        return {word for name in names for word in name.split()}

    assert not words(BASE_CLASSES) & words(NEW_CLASSES)
    for names in (BASE_CLASSES, NEW_CLASSES):
        assert all(sum(word in name.split() for name in names) > 1 for word in words(names))


def test_the_text_model_knows_every_word_and_can_spell_the_rest():
    tokenizer = AutoTokenizer.from_pretrained(str(ROOT / 'assets/shapes/text'))
    assert tokenizer.is_fast
    for name in (*BASE_CLASSES, *NEW_CLASSES):
        assert tokenizer.tokenize(name) == name.split()
    assert tokenizer.unk_token not in tokenizer.tokenize('zebra-crossing no. 17 (old)')


def test_mmdet_reads_what_was_written(tmp_path):
    write_shapes(tmp_path, splits=FEW)
    cfg = config('gdino_lora_shapes.py').val_dataloader.dataset
    cfg.update(data_root=str(tmp_path), pipeline=[])
    dataset = DATASETS.build(cfg)
    assert len(dataset) == 4
    drawn = draw_image(shapes.generator(0, 'new_val', 2), NEW_CLASSES)
    instances = dataset.get_data_info(2)['instances']
    assert [i['bbox_label'] for i in instances] == drawn[2].tolist()
    xywh = np.array([i['bbox'] for i in instances])
    xywh[:, 2:] -= xywh[:, :2]
    np.testing.assert_allclose(xywh, drawn[1], atol=0.02)


@pytest.mark.parametrize(
    'name, split, classes',
    [
        ('gdino_pretrain_shapes.py', 'base', BASE_CLASSES),
        ('gdino_lora_shapes.py', 'new', NEW_CLASSES),
    ],
)
def test_configs_name_the_classes_of_their_split(name, split, classes):
    cfg = config(name)
    for stage, loader in dict(train=cfg.train_dataloader, val=cfg.val_dataloader).items():
        dataset = loader.dataset
        assert dataset.metainfo.classes == classes
        assert dataset.ann_file == f'annotations/{split}_{stage}.json'
        assert dataset.data_prefix.img == f'{split}_{stage}/'


def test_what_is_written_is_left_alone_and_what_is_damaged_is_mended(tmp_path):
    write_shapes(tmp_path, splits=FEW)
    written = files(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.jpg')}
    write_shapes(tmp_path, splits=FEW)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*.jpg')}

    (tmp_path / 'base_val' / '000003.jpg').unlink()
    (tmp_path / 'annotations' / 'new_val.json').write_text('{"info": ')
    write_shapes(tmp_path, splits=FEW)
    assert files(tmp_path) == written


def test_other_seed_or_size_draws_anew(tmp_path):
    write_shapes(tmp_path, splits=FEW)
    written = files(tmp_path)
    write_shapes(tmp_path, seed=1, splits=FEW)
    assert files(tmp_path).keys() == written.keys()
    assert files(tmp_path)['new_val/000000.jpg'] != written['new_val/000000.jpg']
    write_shapes(tmp_path, splits={'new_val': Split(NEW_CLASSES, 3)})
    assert len(os.listdir(tmp_path / 'new_val')) == 3


def test_an_interrupted_drawing_leaves_the_last_whole_split(tmp_path, monkeypatch):
    write_shapes(tmp_path, splits=FEW)
    written = files(tmp_path)
    drawn = []

    def interrupted(*args):
        drawn.append(args)
        if len(drawn) == 3:
            raise KeyboardInterrupt
        return draw_image(*args)

    monkeypatch.setattr(shapes, 'draw_image', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shapes(tmp_path, seed=1, splits=FEW)
    assert files(tmp_path) == written
    monkeypatch.undo()
    write_shapes(tmp_path, seed=1, splits=FEW)
    annotations = json.loads((tmp_path / 'annotations' / 'base_val.json').read_text())
    assert len(annotations['images']) == len(os.listdir(tmp_path / 'base_val')) == 6

"""Mistakes in a config end a run before it starts, each with one sentence that names the remedy."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config

import gdino_lora
from mmdet_gdino_lora.checks.coco_file import read_coco
from mmdet_gdino_lora.datasets.shapes import NEW_CLASSES, Split, write_shapes
from mmdet_gdino_lora.engine.preflight import PreflightHook, check_config
from mmdet_gdino_lora.errors import ConfigError

ROOT = Path(__file__).parent.parent
SPLITS = {name: Split(NEW_CLASSES, 2) for name in ('new_train', 'new_val')}


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> str:
    return f'{write_shapes(tmp_path_factory.mktemp("shapes"), splits=SPLITS)}/'


@pytest.fixture
def cfg(data) -> Config:
    cfg = Config.fromfile(ROOT / 'configs' / 'gdino_lora_shapes.py')
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.dataset.data_root = data
    cfg.val_evaluator.ann_file = data + 'annotations/new_val.json'
    return cfg


def message(cfg: Config) -> str:
    with pytest.raises(ConfigError) as caught:
        check_config(cfg)
    text = str(caught.value)
    assert '\n' not in text and text.count('. ') == 0
    return text


def test_a_right_config_passes(cfg):
    check_config(cfg)
    check_config(cfg, ['train', 'val', 'test'][:2])


def test_wrong_data_root(cfg):
    cfg.train_dataloader.dataset.data_root = 'data/nowhere'
    text = message(cfg)
    assert "train_dataloader.dataset.data_root='data/nowhere'" in text and 'no such folder' in text


def test_names_to_retain_that_the_data_teaches(cfg):
    cfg.model.retain = dict(names=['red circle', 'Purple_star '])
    text = message(cfg)
    assert "model.retain.names holds 'purple star'" in text and 'train_dataloader' in text


def test_missing_annotation_file(cfg, data):
    cfg.val_dataloader.dataset.ann_file = 'annotations/nothing.json'
    text = message(cfg)
    assert "val_dataloader.dataset.ann_file='annotations/nothing.json'" in text
    assert f'{data}annotations/nothing.json' in text


def test_missing_annotation_file_of_the_metric(cfg):
    cfg.val_evaluator.ann_file = '/no/where.json'
    assert "val_evaluator.ann_file='/no/where.json': no such file" in message(cfg)


def test_missing_image_folder(cfg):
    cfg.train_dataloader.dataset.data_prefix.img = 'pictures/'
    assert "train_dataloader.dataset.data_prefix.img='pictures/'" in message(cfg)


def test_class_names_that_the_annotations_do_not_have(cfg):
    cfg.train_dataloader.dataset.metainfo = dict(classes=('cat', 'dog'))
    text = message(cfg)
    assert 'none among the categories of' in text and "'cat', 'dog' are missing" in text
    assert "'purple star'" in text  # what the file has instead


def test_one_class_name_misspelt(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = ('purple stars', *NEW_CLASSES[1:])
    assert '1 of 9 not among the categories' in message(cfg)


def test_classes_left_to_the_data_set_are_cocos(cfg):
    del cfg.train_dataloader.dataset.metainfo
    assert "'person'" in message(cfg)


def test_class_names_in_another_order_than_the_annotations(cfg):
    names = list(NEW_CLASSES)
    names[0], names[1] = names[1], names[0]
    cfg.train_dataloader.dataset.metainfo.classes = tuple(names)
    text = message(cfg)
    assert 'another order' in text and repr(NEW_CLASSES) in text


def test_a_subset_of_the_categories_in_their_order_passes(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = NEW_CLASSES[2:5]
    check_config(cfg)


def test_a_single_class_without_its_comma(cfg):
    cfg.train_dataloader.dataset.metainfo.classes = 'purple star'
    assert "classes=('purple star',)" in message(cfg)


def test_class_names_that_would_not_reach_the_model(cfg):
    cfg.train_dataloader.dataset.return_classes = False
    assert 'set return_classes=True' in message(cfg)


def test_a_checkpoint_that_is_not_there(cfg):
    cfg.load_from = 'nothing.pth'
    assert "load_from='nothing.pth': no such file" in message(cfg)


def test_addresses_are_not_looked_for_on_this_disk(cfg):
    cfg.load_from = 'https://example.com/base.pth'
    check_config(cfg)


def test_wrapped_data_sets_are_found(cfg):
    inner = copy.deepcopy(cfg.train_dataloader.dataset)
    inner.data_root = '/no/where'
    cfg.train_dataloader.dataset = dict(
        type='ConcatDataset', datasets=[dict(type='RepeatDataset', times=2, dataset=inner)]
    )
    assert 'train_dataloader.dataset.datasets.0.dataset.data_root' in message(cfg)


def test_a_file_that_is_no_annotation_file(cfg, tmp_path):
    file = tmp_path / 'list.json'
    file.write_text(json.dumps([1, 2]))
    cfg.train_dataloader.dataset.ann_file = str(file)
    assert 'not an annotation file in COCO format' in message(cfg)


def test_category_names_are_read_wherever_they_stand(tmp_path):
    file = tmp_path / 'annotations.json'
    categories = [dict(id=2, name='b'), dict(id=1, name='a ] "categories": [')]
    file.write_text(json.dumps(dict(categories=categories, info=dict(categories=[1]), images=[])))
    assert read_coco(str(file)).names == ['b', 'a ] "categories": [']
    file.write_text(json.dumps(dict(images=[], categories=categories[:1])))
    assert read_coco(str(file)).names == ['b']


def test_the_hook_checks_what_will_run(cfg):
    runner = SimpleNamespace(cfg=cfg, _train_loop=object(), _val_loop=object(), _test_loop=None)
    PreflightHook().before_run(runner)
    cfg.val_dataloader.dataset.metainfo = dict(classes=('cat',))
    with pytest.raises(ConfigError, match='val_dataloader'):
        PreflightHook().before_run(runner)
    runner._val_loop = None
    PreflightHook().before_run(runner)


# ------------------------------------------------------------------------------- through the tools


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    """Runs a tool in this process; returns its exit status and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, 'argv', [name, *args])
        module = importlib.import_module(f'mmdet_gdino_lora.commands.{name}')
        try:
            gdino_lora.run(module.main)
        except SystemExit as end:
            return end.code, capsys.readouterr().err
        return 0, capsys.readouterr().err

    return run


LORA_CONFIG = str(ROOT / 'configs' / 'gdino_lora_shapes.py')


@pytest.mark.parametrize(
    'args, expected',
    [
        (['train', '/no/config.py'], "config '/no/config.py'"),
        (['train', LORA_CONFIG], 'data_root'),
        (['train', LORA_CONFIG, '--amp'], '--amp needs a GPU'),
        (['train', LORA_CONFIG, '--resume', 'gone.pth'], "--resume='gone.pth'"),
        (['train', LORA_CONFIG, '--cfg-options', 'model.lora=8'], 'data_root'),
        (['test', LORA_CONFIG, 'gone.pth'], "'gone.pth': no such file"),
        (['test', LORA_CONFIG, 'gone.pth', '--out', 'a.txt'], '--out a.txt'),
        (['image_demo', LORA_CONFIG, 'gone.pth', 'no.jpg', '--texts', ' . '], '--texts'),
        (['image_demo', LORA_CONFIG, 'gone.pth', 'no.jpg', '--texts', 'cat'], "image 'no.jpg'"),
    ],
)
def test_tools_tell_a_mistake_in_one_sentence(tool, monkeypatch, args, expected):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    monkeypatch.setattr('mmdet_gdino_lora.engine.unfit.get_device', lambda: 'cpu')
    status, told = tool(*args)
    assert status == 2
    assert told.startswith('error: ') and expected in told
    assert told.count('\n') == 1 and 'Traceback' not in told


def test_train_save_resume_and_test_with_the_tools(tool, data, tmp_path):
    options = f"""
_base_ = '{ROOT}/configs/gdino_lora_shapes.py'
model = dict(
    base_checkpoint=None,
    retain=None,
    encoder=dict(num_layers=1),
    decoder=dict(num_layers=1),
    num_queries=10,
    test_cfg=dict(max_per_img=10),
)
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False,
                        dataset=dict(data_root={data!r}))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root={data!r}))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={data + 'annotations/new_val.json'!r})
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1, val_interval=1)
"""
    config = tmp_path / 'small.py'
    config.write_text(options)
    work = tmp_path / 'work'
    assert tool('train', str(config), '--work-dir', str(work))[0] == 0
    assert (work / 'epoch_1.pth').exists()
    again = ['--resume', '--cfg-options', 'train_cfg.max_epochs=2']
    assert tool('train', str(config), '--work-dir', str(work), *again)[0] == 0
    assert (work / 'epoch_2.pth').exists() and not (work / 'epoch_1.pth').exists()
    predictions = tmp_path / 'found.pkl'
    checkpoint = str(work / 'epoch_2.pth')
    status = tool(
        'test', str(config), checkpoint, '--work-dir', str(work), '--out', str(predictions)
    )
    assert status[0] == 0 and predictions.exists()
    picture = tmp_path / 'found.png'
    image = data + 'new_val/000000.jpg'
    demo = [str(config), checkpoint, image, '--texts', 'purple star . dog', '--out', str(picture)]
    assert tool('image_demo', *demo, '--score-thr', '0')[0] == 0
    assert picture.exists()

"""`new-config`: a folder of photos in, a config that trains and is checked out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any, Optional

import pytest
from mmdet.registry import DATASETS
from mmengine.config import Config

from mmdet_gdino_lora.files import download
from mmdet_gdino_lora.formats.config import Plan, config_text
from mmdet_gdino_lora.shipped import config_path
from mmdet_gdino_lora.text import files
from tests.photo_folders import (
    LAYOUTS,
    NAMES,
    THINGS,
    photos,
    real,
    roboflow,
    voc_apart,
    voc_xml,
    write,
    write_photo,
    yolo_splits,
    yolo_txt,
)
from tests.tool_run import base_for, inside, run_tool, small

TOOL = 'python tools/new_config.py'


def typed(command: str, folder: Path, capsys: pytest.CaptureFixture) -> str:
    """What the tool says."""
    capsys.readouterr()
    run_tool(f'{TOOL} {command}', folder)
    return capsys.readouterr().out


def refused(command: str, folder: Path, capsys: pytest.CaptureFixture) -> str:
    """The sentence with which it ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_tool(f'{TOOL} {command}', folder)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith('error: ') and error.count('\n') == 1
    return error


def things(root: Path) -> Path:
    """A folder with the photos below `photos`, where commands are typed."""
    voc_apart(root / 'photos')
    return root


def datasets(cfg: Config) -> list:
    """Every data set of a config, built."""
    loaders = (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader)
    return [DATASETS.build(dict(loader.dataset, lazy_init=False)) for loader in loaders]


def state(root: Path) -> dict[str, str]:
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob('*') if p.is_file()
    }


# --------------------------------------------------------------------------------- what is written


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_becomes_a_config_whose_data_is_loaded(
    layout: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    LAYOUTS[layout][0](tmp_path / 'photos')
    before = state(tmp_path / 'photos')
    typed('photos --base shapes', tmp_path, capsys)
    assert state(tmp_path / 'photos') == before
    train, val, test = datasets(Config.fromfile(tmp_path / 'my_things.py'))
    assert train.metainfo['classes'] == val.metainfo['classes'] == ('bolt', 'nut', 'washer')
    assert len(train) + len(val) == len(THINGS) and len(test) == len(val) > 0
    for data in (train, val):
        sample = data[0]['data_samples']
        assert sample.text == 'bolt. nut. washer.'
        assert len(sample.gt_instances) == len(data.get_data_info(0)['instances'])
    # What is trained from and measured on are the boxes of the label tool, whichever it was.
    loaded = {
        Path(info['img_path']).stem: [
            (NAMES[i['bbox_label']], i['bbox']) for i in info['instances']
        ]
        for data in (train, val)
        for info in map(data.get_data_info, range(len(data)))
    }
    assert loaded.keys() == {thing.name for thing in THINGS}
    for thing in THINGS:
        assert [name for name, _ in loaded[thing.name]] == [name for name, _ in thing.boxes]
        for (_, found), (_, corners) in zip(loaded[thing.name], thing.boxes):
            assert found == pytest.approx(corners, abs=0.01)


def test_the_config_on_the_shapes_base_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = typed('photos --base shapes --names bolt="wheel bolt"', things(tmp_path), capsys)
    command = next(line.strip() for line in said.splitlines() if 'tools/train.py' in line)
    words = shlex.split(command)
    assert words[0] == 'python' and words[2:] == ['my_things.py']
    settings = 'train_dataloader.batch_size=2 train_dataloader.num_workers=0 '
    settings += 'train_dataloader.persistent_workers=False train_cfg.max_epochs=1 val_cfg=None '
    settings += 'val_dataloader=None val_evaluator=None default_hooks.checkpoint.save_best=None '
    settings += 'default_hooks.checkpoint.interval=1'
    run_tool(f'python tools/train.py my_things.py --cfg-options {settings}', tmp_path)
    assert list((tmp_path / 'work_dirs/my_things').glob('epoch_1.pth'))
    cfg = Config.fromfile(tmp_path / 'my_things.py')
    assert cfg.custom_hooks == [dict(type='ReportHook')]
    assert cfg.model.bbox_head.num_classes == 16
    assert 'wheel bolt. nut' in datasets(cfg)[0][0]['data_samples'].text


def written(folder: Path, **changes: Any) -> Config:
    """The config of a plan."""
    plan = Plan(
        base='gdino_lora_shapes',
        made_from='',
        photos=dict(train='photos', val='photos'),
        folder='my_things',
        classes=['bolt'],
        prompts={},
        samples=False,
        retained=None,
        checkpoint=None,
        images=80,
        measured=20,
        many=False,
    )
    (folder / 'my_things.py').write_text(config_text(dataclasses.replace(plan, **changes)))
    return Config.fromfile(folder / 'my_things.py')


@pytest.mark.parametrize('images, epochs', [(1, 60), (8, 60), (9, 150), (160, 15), (2000, 4)])
def test_on_the_shapes_base_epochs_make_300_steps(images: int, epochs: int, tmp_path: Path) -> None:
    cfg = written(tmp_path, images=images)
    assert cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == epochs
    assert (
        cfg.default_hooks.checkpoint.interval == cfg.train_cfg.val_interval == max(1, epochs // 5)
    )


@pytest.mark.parametrize('base', ['gdino_lora_shapes', 'gdino_lora_few'])
@pytest.mark.parametrize('measured, best', [(19, None), (20, 'auto')])
def test_the_best_checkpoint_is_kept_where_there_is_enough_to_measure_on(
    base: str, measured: int, best: Optional[str], tmp_path: Path
) -> None:
    cfg = written(tmp_path, base=base, measured=measured)
    assert cfg.default_hooks.checkpoint.get('save_best') == best
    assert cfg.default_hooks.checkpoint.type == 'AdapterCheckpointHook'


def test_the_config_on_the_published_base_trains_a_small_model_of_its_kind(
    tmp_path: Path, text_dir: str, capsys: pytest.CaptureFixture
) -> None:
    names = 'bolt=cat nut="red circle" washer=dog'
    typed(f'photos --base published --names {names}', things(tmp_path), capsys)
    with inside(tmp_path, LANG_MODEL=text_dir):
        cfg = Config.fromfile('my_things.py')
        inherited = Config.fromfile(config_path('gdino_lora_few')).custom_hooks
        assert len(inherited) == 3
        assert cfg.custom_hooks == [*inherited, dict(type='ReportHook')]
        # What the photos teach can't be held to the base.
        assert cfg.model.retain.names == ['person', 'car', 'chair', 'bottle']
        cfg = small(cfg)
        cfg.model.retain = None
        cfg.model.base_checkpoint = base_for(cfg, tmp_path / 'base.pth')
        cfg.dump('small.py')
    run_tool('python tools/train.py small.py', tmp_path)
    assert list((tmp_path / 'work_dirs/small').glob('epoch_1.pth'))
    assert (tmp_path / 'work_dirs/small/report.html').is_file()
    scores = json.loads((tmp_path / 'work_dirs/small/thresholds.json').read_text())
    assert list(scores) == ['bolt', 'nut', 'washer']
    texts = {d[0]['data_samples'].text for d in datasets(Config.fromfile(tmp_path / 'small.py'))}
    assert texts == {'cat. red circle. dog.'}


@pytest.mark.parametrize('name', ['raccoon', 'cards', 'coco_tiny'])
def test_real_photos_become_a_config(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    said = typed(f'{real(name)} --base shapes', tmp_path, capsys)
    train, val, test = datasets(Config.fromfile(tmp_path / 'my_things.py'))
    counts = {'raccoon': (160, 40, 40), 'cards': (237, 59, 67), 'coco_tiny': (50, 50, 50)}
    assert (len(train), len(val), len(test)) == counts[name]
    assert ('21 classes without a box are left out' in said) == (name == 'coco_tiny')
    assert 'look like codes' not in said
    for data in (train, val):
        assert len(data[0]['data_samples'].gt_instances)


# ----------------------------------------------------------------------------------- what is told


def test_codes_are_pointed_out_until_they_have_words(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = yolo_splits(tmp_path / 'photos')
    write(root, {'data.yaml': 'names: [RBC, class_3, nut]\n'})
    said = typed('photos --base shapes', tmp_path, capsys)
    assert "'RBC', 'class_3' look like codes" in said and '--names RBC="..."' in said
    names = 'RBC="red blood cell" class_3=platelet'
    said = typed(f'photos --base shapes --overwrite --names {names}', tmp_path, capsys)
    assert 'look like codes' not in said
    train, *_ = datasets(Config.fromfile(tmp_path / 'my_things.py'))
    assert train[0]['data_samples'].text.startswith('red blood cell. platelet. ')
    assert train.metainfo['classes'] == ('RBC', 'class_3', 'nut')


def test_a_base_that_is_out_of_reach_is_told_with_the_way_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    things(tmp_path)
    monkeypatch.setattr(files, 'is_out_of_reach', lambda name: False)
    monkeypatch.setattr(download, 'is_out_of_reach', lambda source: True)
    said = typed('photos', tmp_path, capsys)
    assert re.search('published base https://.* can not be reached .* --base FILE', said)
    cfg = Config.fromfile(tmp_path / 'my_things.py')
    assert Path(cfg.model.base_checkpoint).is_file() and cfg.model.retain is None
    monkeypatch.setattr(download, 'is_out_of_reach', lambda source: False)
    said = typed('photos --overwrite', tmp_path, capsys)
    assert 'can not be reached' not in said and 'downloads the base' in said
    assert Config.fromfile(tmp_path / 'my_things.py').model.lora.preset == ['encoder', 'decoder']


def test_a_copy_of_the_base_is_written_into_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (things(tmp_path) / 'base.pth').touch()
    typed('photos --base base.pth', tmp_path, capsys)
    cfg = Config.fromfile(tmp_path / 'my_things.py')
    assert cfg.model.base_checkpoint == str(tmp_path / 'base.pth')


def test_another_folder_may_be_measured_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    things(tmp_path)
    other = write(photos(tmp_path / 'other', '', THINGS[:2]), {'classes.txt': 'nut\nbolt\nrust\n'})
    write(other, {f'{t.name}.txt': yolo_txt(t, ['nut', 'bolt']) for t in THINGS[:2]})
    said = typed('photos --val other --base shapes', tmp_path, capsys)
    assert "1 classes without a box are left out: 'rust'" in said
    train, val, _ = datasets(Config.fromfile(tmp_path / 'my_things.py'))
    assert (len(train), len(val)) == (7, 2)
    assert train.metainfo == val.metainfo
    # By name, and not by the number that the other labels give it.
    assert val.get_data_info(0)['instances'][0]['bbox_label'] == 0
    assert val[0]['data_samples'].img_path == str(tmp_path / 'other/a.jpg')


def test_many_names_are_sampled_for_training_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    words = [f'{one} {other} thing' for one in ('red', 'blue', 'green') for other in range(40)]
    root = photos(tmp_path / 'photos', 'images', THINGS[:2])
    labels = ''.join(f'{n} .5 .5 .5 .5\n' for n in range(120))
    write(root, {'labels/a.txt': labels, 'labels/b.txt': labels})
    write(root, {'data.yaml': json.dumps(dict(names=words))})
    typed('photos --base shapes', tmp_path, capsys)
    cfg = Config.fromfile(tmp_path / 'my_things.py')
    spans = [
        next(step for step in loader.dataset.pipeline if step.type == 'TokenSpans')
        for loader in (cfg.train_dataloader, cfg.val_dataloader)
    ]
    assert [step.get('num_negatives') for step in spans] == ['fit', None]
    assert cfg.model.bbox_head.num_classes == 120  # a label for each, or the first step ends it
    assert cfg.model.bbox_head.type == 'GroundingDINOCriterionHead'


# ----------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    'command, told',
    [
        ('gone', 'gone.: no such folder; give the folder'),
        ('photos --val gone', 'gone.: no such folder'),
        ('photos -o my_things', "-o 'my_things': a config is a .py file"),
        ('photos -o gone/a.py', "-o 'gone/a.py': no folder .*; make it"),
        ('photos -o photos/a.py', "-o 'photos/a.py' lies in the folder of the photos"),
        ('. -o a.py', 'lies in the folder of the photos'),
        ('photos --names bolt', '--names \'bolt\': write CLASS="words"'),
        ('photos --names blot=a', "--names 'blot=a': the labels have no class 'blot'; they have"),
        ('photos --base gone.pth', "--base 'gone.pth': neither 'published', 'shapes' nor a file"),
        ('photos --format yolo', 'no labels in the format yolo .*; it has voc'),
    ],
)
def test_a_mistake_costs_nothing(
    command: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    before = state(things(tmp_path))
    assert re.search(told, refused(command, tmp_path, capsys))
    assert state(tmp_path) == before


def test_what_is_there_is_written_over_only_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    things(tmp_path)
    for name in ('my_things.py', 'my_things/val.json'):
        write(tmp_path, {name: 'mine'})
        told = refused('photos --base shapes', tmp_path, capsys)
        assert f"{name}' is there already" in told and '--overwrite' in told
        typed('photos --base shapes --overwrite', tmp_path, capsys)
        assert (tmp_path / name).read_text() != 'mine'
        (tmp_path / 'my_things.py').unlink()
        (tmp_path / 'my_things/train.json').unlink()
        (tmp_path / 'my_things/val.json').unlink()


def test_one_photo_is_too_few_to_take_some_off(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    root = tmp_path / 'photos'
    write_photo(root / 'a.jpg', (64, 48))
    write(root, {'a.xml': voc_xml(THINGS[0])})
    assert 'too few photos (1)' in refused('photos', tmp_path, capsys)
    typed('photos --val photos --base shapes', tmp_path, capsys)


def test_photos_that_are_all_to_be_measured_on_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    roboflow(tmp_path / 'photos')
    (tmp_path / 'photos/train/_annotations.coco.json').unlink()
    assert 'no labelled photo to train from' in refused('photos', tmp_path, capsys)

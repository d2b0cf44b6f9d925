"""Labelling a folder of photos: what is written, read again, gone on with, and completed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
import torch
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from torch.multiprocessing.spawn import ProcessException

from mmdet_gdino_lora.engine.preflight import check_config
from mmdet_gdino_lora.labelling.completion import complete, sort_out, threshold_of
from mmdet_gdino_lora.labelling.detections import Found, least_certain
from mmdet_gdino_lora.labelling.kept import Kept
from tests.processes import in_new_processes
from tests.tool_run import Things, run_tool

NAMES = ['wheel bolt', 'cracked tile']
#: The small model is unsure of everything.
LOW = '--threshold 0 --batch-size 2'


@pytest.fixture(scope='module')
def photos(things: Things, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five photos in two folders, and what is none."""
    folder = tmp_path_factory.mktemp('photos')
    (folder / 'more' / '.hidden').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for place, name in enumerate(['a.jpg', 'b.PNG', 'more/c.jpg', 'more/d.jpg', 'z.jpg']):
        noise = rng.integers(0, 255, (64 - 8 * place, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / name), noise)
    shutil.copy(folder / 'a.jpg', folder / 'more' / '.hidden' / 'a.jpg')
    (folder / 'more' / 'broken.jpg').write_bytes(b'\xff\xd8 no picture')
    (folder / 'notes.txt').write_text('nothing')
    return folder


def label(things: Things, photos: Path, out: Path, more: str = LOW) -> str:
    """The command line, typed."""
    things.run(f'python tools/label.py my_things.py CHECKPOINT {photos} -o {out} {more}')
    return out.read_text()


def told(capsys: pytest.CaptureFixture, things: Things, command: str) -> str:
    """The sentence that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        things.run(f'python tools/label.py {command}')
    error = capsys.readouterr().err
    assert end.value.code == 2 and 'Traceback' not in error
    sentence = error.splitlines()[-1]
    assert sentence.startswith('error: ')
    return sentence


@pytest.fixture(scope='module')
def labelled(things: Things, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is written without a kill."""
    out = tmp_path_factory.mktemp('labelled') / 'out.json'
    label(things, photos, out)
    return out


# ------------------------------------------------------------------------------------- COCO's json


def test_the_json_is_a_data_set(labelled: Path, photos: Path) -> None:
    content = json.loads(labelled.read_text())
    assert [image['file_name'] for image in content['images']] == [
        'a.jpg', 'b.PNG', 'more/c.jpg', 'more/d.jpg', 'z.jpg',
    ]  # fmt: skip
    for image in content['images']:
        height, width = cv2.imread(str(photos / image['file_name'])).shape[:2]
        assert (image['width'], image['height']) == (width, height)
    assert [category['name'] for category in content['categories']] == NAMES
    sizes = {image['id']: (image['width'], image['height']) for image in content['images']}
    assert len(content['annotations']) > 5
    for number, box in enumerate(content['annotations'], 1):
        x, y, width, height = box['bbox']
        assert box['id'] == number and box['iscrowd'] == 0 and 0 <= box['score'] <= 1
        assert box['area'] == pytest.approx(width * height, abs=0.01)
        assert x + width <= sizes[box['image_id']][0] + 0.01
        assert y + height <= sizes[box['image_id']][1] + 0.01
    assert [path.name for path in labelled.parent.iterdir()] == ['out.json']


def test_training_reads_it_and_takes_a_step(
    things: Things, labelled: Path, photos: Path, tmp_path: Path
) -> None:
    content = json.loads(labelled.read_text())
    cfg = Config.fromfile(things.folder / 'my_things.py')
    data = dict(data_root='', ann_file=str(labelled), data_prefix=dict(img=f'{photos}/'))
    for part in (cfg.train_dataloader.dataset, cfg.test_dataloader.dataset):
        part.update(data)
    dataset = CocoDataset(metainfo=dict(classes=NAMES), pipeline=[], **data)
    read = [instance for item in dataset.load_data_list() for instance in item['instances']]
    assert len(read) == len(content['annotations'])
    assert {instance['bbox_label'] for instance in read} <= {0, 1}
    check_config(cfg, ['train'])
    cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
    cfg.dump(tmp_path / 'again.py')
    run_tool(f'python tools/train.py {tmp_path}/again.py --work-dir {tmp_path}/run', things.folder)
    assert (tmp_path / 'run' / 'epoch_1.pth').is_file()


def test_a_threshold_of_a_class_is_its_own(
    things: Things, labelled: Path, photos: Path, tmp_path: Path
) -> None:
    every = json.loads(labelled.read_text())['annotations']
    middle = float(np.median([box['score'] for box in every if box['category_id'] == 1]))
    own = f'--threshold 0 --threshold "wheel bolt={middle}" --batch-size 2'
    kept = json.loads(label(things, photos, tmp_path / 'out.json', own))['annotations']
    wanted = [box for box in every if box['category_id'] == 2 or box['score'] >= middle]
    assert 0 < len(wanted) < len(every)
    assert [box['bbox'] for box in kept] == [box['bbox'] for box in wanted]


def test_a_reports_thresholds_hold_where_none_is_typed(
    things: Things, labelled: Path, photos: Path, tmp_path: Path
) -> None:
    every = json.loads(labelled.read_text())['annotations']
    middle = float(np.median([box['score'] for box in every if box['category_id'] == 1]))
    report = tmp_path / 'thresholds.json'
    report.write_text(json.dumps({NAMES[0]: middle, NAMES[1]: 1.0}))
    asked = f'--thresholds {report} --threshold "{NAMES[1]}=0" --batch-size 2'
    kept = json.loads(label(things, photos, tmp_path / 'out.json', asked))['annotations']
    wanted = [box for box in every if box['category_id'] == 2 or box['score'] >= middle]
    assert [box['bbox'] for box in kept] == [box['bbox'] for box in wanted]


# ------------------------------------------------------------------------------------------ killed


def label_and_die(_: int, folder: str, command: str, batches: int, share: float) -> None:
    """Labels until a batch of photos is being kept, of which a share of the line is written."""
    kept = []
    write = Kept.add

    def add(self: Kept, batch: list, found: list) -> None:
        write(self, batch, found)
        kept.append(batch)
        if len(kept) == batches:
            with open(self.path, 'rb+') as file:
                lines = file.read().splitlines(keepends=True)
                file.truncate(sum(map(len, lines[:-1])) + int(share * len(lines[-1])))
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kept, 'add', add)
        run_tool(command, Path(folder))


@pytest.mark.parametrize(('batches', 'share'), [(1, 0.5), (2, 1.0), (3, 0.0)])
def test_killed_and_started_again_it_writes_the_same(
    things: Things, labelled: Path, photos: Path, tmp_path: Path, batches: int, share: float
) -> None:
    out = tmp_path / 'out.json'
    command = f'python tools/label.py my_things.py {things.checkpoint} {photos} -o {out} {LOW}'
    with pytest.raises(ProcessException, match='SIGKILL'):
        in_new_processes(label_and_die, str(things.folder), command, batches, share)
    begun = Path(f'{out}.begun.jsonl')
    assert begun.is_file() and not out.exists()
    with pytest.MonkeyPatch.context() as patch:
        added = []
        write = Kept.add
        patch.setattr(Kept, 'add', lambda *a: (added.append(a), write(*a)))
        assert label(things, photos, out) == labelled.read_text()
    assert len(added) == 3 - batches + (share < 1)
    assert [path.name for path in tmp_path.iterdir()] == ['out.json']


def test_other_settings_are_told(
    things: Things, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / 'out.json'
    begun = Path(f'{out}.begun.jsonl')
    command = f'my_things.py {things.checkpoint} {photos} -o {out} {LOW}'
    begun.write_text('{"settings": {"CHECKPOINT": "another"}, "thresholds": []}\n')
    error = told(capsys, things, command)
    assert f'{begun} holds what an earlier start' in error and "'CHECKPOINT', 'CONFIG'" in error
    assert '--overwrite' in error
    label(things, photos, out, f'{LOW} --overwrite')
    assert not begun.exists()


def test_other_thresholds_are_told_and_use_what_was_detected(
    things: Things, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out, more = tmp_path / 'out.json', '--batch-size 5 --threshold'
    command = f'python tools/label.py my_things.py {things.checkpoint} {photos} -o {out} {more} 0.1'
    with pytest.raises(ProcessException, match='SIGKILL'):
        in_new_processes(label_and_die, str(things.folder), command, 1, 1.0)
    capsys.readouterr()
    label(things, photos, out, f'{more} 0.2')
    said = capsys.readouterr().out
    assert 'goes on from ' in said and "--threshold was ['0.1'] then" in said


def test_kept_batches_are_those_of_the_same_photos(tmp_path: Path) -> None:
    from mmdet_gdino_lora.labelling.photos import Photo

    path = str(tmp_path / 'kept')
    one, other = Photo('a', 1, 2), Photo('b', 1, 2)
    found = [Found(8, 8, [[1.0, 2.0, 3.0, 4.0]], [0.5], [1])]
    Kept(path, dict(a=1), [], False).add([one], found)
    with open(path, 'ab') as file:
        file.write(b'\0\0\n{"photos": "half')
    again = Kept(path, dict(a=1), [], False)
    assert again.of([one]) == found and again.of([other]) is None
    assert again.of([Photo('a', 1, 3)]) is None
    again.add([other], found)
    assert Kept(path, dict(a=1), [], False).of([other]) == found
    Path(path).write_bytes(b'{"sett')  # killed while it was begun
    assert Kept(path, dict(a=1), [], False).of([one]) is None


# --------------------------------------------------------------------------------- label tools


def test_label_studios_tasks(things: Things, labelled: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / 'tasks.json'
    tasks = json.loads(label(things, photos, out, f'{LOW} --format label-studio'))
    content = json.loads(labelled.read_text())
    assert tasks[2]['data'] == dict(image='/data/local-files/?d=more/c.jpg')
    view = ElementTree.parse(tmp_path / 'tasks_view.xml').getroot()
    image, labels = view
    assert image.get('value') == '$image' and [one.get('value') for one in labels] == NAMES
    places = []
    for task in tasks:
        (prediction,) = task['predictions']
        for region in prediction['result']:
            assert (region['from_name'], region['to_name']) == (labels.get('name'), 'image')
            value = region['value']
            width, height = region['original_width'] / 100, region['original_height'] / 100
            places.append([value['x'] * width, value['y'] * height])
            places[-1] += [value['width'] * width, value['height'] * height]
        scores = [region['score'] for region in prediction['result']]
        assert prediction['score'] == min(scores, default=0)
    assert places == [pytest.approx(box['bbox']) for box in content['annotations']]


def test_cvats_xml(things: Things, labelled: Path, photos: Path, tmp_path: Path) -> None:
    label(things, photos, tmp_path / 'out.xml', f'{LOW} --format cvat')
    root = ElementTree.parse(tmp_path / 'out.xml').getroot()
    content = json.loads(labelled.read_text())
    images = root.findall('image')
    assert [image.get('name') for image in images] == [i['file_name'] for i in content['images']]
    assert [image.get('id') for image in images] == list('01234')
    boxes = root.findall('image/box')
    assert len(boxes) == len(content['annotations'])
    for box, wanted in zip(boxes, content['annotations']):
        x, y, width, height = wanted['bbox']
        corners = [float(box.get(key, '')) for key in ('xtl', 'ytl', 'xbr', 'ybr')]
        assert corners == pytest.approx([x, y, x + width, y + height], abs=0.02)
        assert box.get('label') == NAMES[wanted['category_id'] - 1]
        assert box.get('occluded') == '0'
        assert float(box.findtext('attribute') or 'nan') == wanted['score']


# ------------------------------------------------------------------------------- least certain


def test_the_least_certain_are_nearest_to_their_classs_threshold() -> None:
    box = [0.0, 0.0, 9.0, 9.0]
    found = dict(
        sure=Found(9, 9, [box], [0.9], [0]),
        below=Found(9, 9, [box], [0.28], [0]),
        above=Found(9, 9, [box, box], [0.9, 0.61], [0, 1]),
        nothing=Found(9, 9),
        broken=Found(unreadable='is empty'),
    )
    assert least_certain(found, [0.3, 0.6], 2) == ['above', 'below']
    assert least_certain(found, [0.3, 0.6], 9) == ['above', 'below', 'sure']


def test_pictures_of_the_least_certain(
    things: Things, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    inside = tmp_path / 'photos'
    shutil.copytree(photos, inside)
    for _ in range(2):  # the second start doesn't take the first one's pictures for photos
        label(things, inside, inside / 'out.json', f'{LOW} --uncertain 3 --overwrite')
        pictures = sorted((inside / 'out_uncertain').iterdir())
        assert [path.name[:5] for path in pictures] == ['0001_', '0002_', '0003_']
        assert all(cv2.imread(str(path)) is not None for path in pictures)
        assert len(json.loads((inside / 'out.json').read_text())['images']) == 5
    said = capsys.readouterr().out
    assert f'left out: {inside}/more/broken.jpg is damaged or no image' in said
    assert 'wheel bolt: ' in said and 'out_uncertain/' in said


# ------------------------------------------------------------------------------------ completion


def test_detections_are_held_against_labels() -> None:
    found = Found(
        100, 100,
        [[0, 0, 10, 10], [1, 0, 10, 10], [50, 50, 10, 10], [51, 50, 10, 10], [80, 0, 10, 10],
         [5, 5, 10, 10], [0, 85, 9, 9]],
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3], [0, 0, 0, 1, 1, 0, 0],
    )  # fmt: skip
    labels = [[0, 0, 10, 10], [80, 0, 10, 10], [0, 80, 40, 20]]
    kinds = sort_out(found, labels, [0, 0, 0], [0, 0, 1], bound=0.1)
    # The second is on a label that is taken, the fourth on a surer one, the fifth on a label of
    # another class, the sixth near a label that is taken, the last in a crowd.
    assert (kinds.on_labels, kinds.mistaken, kinds.free) == ([0], [4], [2])
    # What overlaps a label by less than the bound is free, and may be on a label none the less.
    kinds = sort_out(found, labels, [0, 1, 0], [0, 0, 1], bound=1.0)
    assert (kinds.on_labels, kinds.mistaken, kinds.free) == ([0, 4], [], [1, 2, 3, 5])


def test_a_thing_whose_surest_detection_is_wrong_tells_of_a_mistake() -> None:
    boxes = [[0, 0, 10, 10], [0, 0, 10, 10], [40, 0, 10, 10], [44, 0, 10, 10], [80, 0, 10, 10]]
    found = Found(100, 100, boxes, [0.9, 0.8, 0.7, 0.6, 0.5], [1, 0, 0, 0, 0])
    labels = [[0, 0, 10, 10], [44, 0, 10, 10], [80, 0, 10, 10]]
    kinds = sort_out(found, labels, [0] * 3, [0] * 3, 0.3)
    # On the first the wrong class is surer, on the second the one that is placed badly.
    assert (kinds.on_labels, kinds.mistaken, kinds.free) == ([4], [0, 2], [])


@pytest.mark.parametrize(
    ('things', 'labelled_', 'again'),
    [(100, 0.5, 0.5), (300, 0.5, 0.5), (1000, 0.5, 0.5), (1000, 0.8, 0.4)],
)
def test_what_is_added_is_right_in_95_of_100_cases(
    things: int, labelled_: float, again: float
) -> None:
    rng = np.random.default_rng(0)
    precision, recall = [], []
    for _ in range(100):
        right, wrong = rng.beta(5, 2, things), rng.beta(1.2, 6, 3 * things)
        has_label = rng.random(things) < labelled_
        free = np.concatenate([right[~has_label], wrong])
        threshold = threshold_of(right[has_label], free)
        if threshold is None:
            continue
        added = (free >= threshold).sum()
        good = (right[~has_label] >= threshold).sum()
        precision.append(good / added)
        recall.append(good / (~has_label).sum())
    assert len(precision) > 50
    assert np.mean(precision) > 0.94 and np.mean(recall) > again


@pytest.mark.parametrize('things', [100, 300, 1000])
def test_mistakes_on_labels_tell_of_those_that_would_be_added(things: int) -> None:
    rng = np.random.default_rng(0)
    shares: dict[str, list[float]] = {'told': [], 'untold': []}
    for _ in range(100):
        right, wrong = rng.beta(5, 2, things), rng.beta(3, 3, things // 5)  # of class or place
        with_label, on_one = rng.random(things) < 0.5, rng.random(things // 5) < 0.5
        free = np.concatenate([right[~with_label], wrong[~on_one], rng.beta(1.2, 6, things)])
        for name, mistaken in dict(told=wrong[on_one], untold=np.array([])).items():
            threshold = threshold_of(right[with_label], free, mistaken)
            if threshold is not None:
                good = (right[~with_label] >= threshold).sum()
                shares[name].append(good / (free >= threshold).sum())
    assert np.mean(shares['told']) > 0.945 and len(shares['told']) > 75
    assert np.mean(shares['untold']) < 0.94


def test_who_asks_for_fewer_right_ones_gets_more() -> None:
    rng = np.random.default_rng(0)
    right, free, wrong = rng.beta(5, 2, 200), rng.beta(5, 2, 200), rng.beta(3, 3, 60)
    free = np.concatenate([free, rng.beta(3, 3, 60), rng.beta(1.2, 6, 400)])
    added = {}
    for share in (0.95, 0.85, 0.7):
        threshold = threshold_of(right, free, wrong, share)
        added[share] = 0 if threshold is None else int((free >= threshold).sum())
    assert added[0.95] < added[0.85] < added[0.7]


def test_where_nothing_is_missing_nothing_is_added() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        assert threshold_of(rng.beta(5, 2, 500), rng.beta(1.2, 6, 1500)) is None
    assert threshold_of(np.array([0.9] * 5), np.array([0.9] * 5)) is None  # too few to tell
    assert threshold_of(np.array([0.9] * 50), np.array([])) is None


def test_completion_keeps_labels_and_marks_what_it_adds() -> None:
    content = dict(
        info='mine',
        images=[dict(id=7, file_name='a.jpg', width=100, height=100)],
        annotations=[dict(id=3, image_id=7, category_id=20, bbox=[0, 0, 10, 10], iscrowd=0)],
        categories=[dict(id=20, name='dog'), dict(id=10, name='cat'), dict(id=1, name='other')],
    )
    boxes = [[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 10.0, 20.0], [70.0, 0.0, 9.0, 9.0]]
    found = {'a.jpg': Found(100, 100, boxes, [0.9, 0.8, 0.2], [1, 0, 0])}
    before = json.dumps(content)
    completed, thresholds = complete(content, found, ['cat', 'dog'], [0.5, None], bound=0.3)
    assert json.dumps(content) == before and thresholds == [0.5, None]
    assert completed['info'] == 'mine' and completed['categories'] == content['categories']
    label_, added = completed['annotations']
    assert label_ == content['annotations'][0]
    assert added == dict(
        id=4, image_id=7, category_id=10, bbox=boxes[1], area=200.0, iscrowd=0, segmentation=[],
        score=0.8, completed=True,
    )  # fmt: skip


def test_a_set_is_completed_beside_it(things: Things, tmp_path: Path) -> None:
    mine = things.folder / 'data/my_things/annotations/train.json'
    before = mine.read_bytes()
    out = tmp_path / 'out.json'
    folder = things.folder / 'data/my_things/train'
    completed = json.loads(label(things, folder, out, f'{LOW} --complete {mine} --overlap 0.9'))
    assert mine.read_bytes() == before
    content = json.loads(before)
    count = len(content['annotations'])
    assert completed['annotations'][:count] == content['annotations']
    added = completed['annotations'][count:]
    assert added and all(box['completed'] and 'score' in box for box in added)
    assert len({box['id'] for box in completed['annotations']}) == count + len(added)
    cfg = Config.fromfile(things.folder / 'my_things.py')
    cfg.train_dataloader.dataset.update(
        data_root='', ann_file=str(out), data_prefix=dict(img=f'{folder}/')
    )
    check_config(cfg, ['train'])


# ------------------------------------------------------------------------------------ mistakes


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[Path]:
    """A folder without photos."""
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'other.json').write_text(
        json.dumps(dict(images=[dict(id=1, file_name='0.jpg', width=64, height=64)],
                        annotations=[], categories=[dict(id=1, name='bolt')]))
    )  # fmt: skip
    yield tmp_path


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ('CHECKPOINT EMPTY/empty -o EMPTY/o.json', 'holds nothing and no photos; name a folder'),
        ('CHECKPOINT gone -o EMPTY/o.json', "PHOTOS 'gone': no such folder"),
        ('gone.pth PHOTOS -o EMPTY/o.json', "CHECKPOINT 'gone.pth': no such file or folder"),
        ('CHECKPOINT PHOTOS -o my_things.py', "-o 'my_things.py': --format coco is a .json file"),
        ('CHECKPOINT PHOTOS -o EMPTY/other.json', "other.json' is there already; name another"),
        ('CHECKPOINT PHOTOS -o EMPTY/o.json --threshold wheelbolt=0.3',
         "has no class 'wheelbolt'; did you mean 'wheel bolt'"),
        ('CHECKPOINT PHOTOS -o EMPTY/o.json --threshold 30', "'30' is no score between 0 and 1"),
        ('CHECKPOINT PHOTOS -o EMPTY/o.json --complete EMPTY/other.json',
         "no category 'wheel bolt', 'cracked tile' of the config, but 'bolt'"),
        ('CHECKPOINT PHOTOS -o EMPTY/o.json --complete gone.json', "'gone.json': no such file"),
        ('CHECKPOINT PHOTOS -o EMPTY/other.json --overwrite --complete EMPTY/other.json',
         'is the file that is to be completed, which is never changed'),
        ('CHECKPOINT PHOTOS -o EMPTY/o.json --overlap 0', '--overlap 0.0: give a number above 0'),
        ('CHECKPOINT PHOTOS -o EMPTY/o.json --right 95', '--right 95.0: give a share between'),
        ('CHECKPOINT PHOTOS -o EMPTY/o.json --batch-size 0', '--batch-size 0: give numbers'),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence(
    things: Things, empty: Path, photos: Path, capsys: pytest.CaptureFixture,
    arguments: str, said: str,
) -> None:  # fmt: skip
    command = arguments.replace('EMPTY', str(empty)).replace('PHOTOS', str(photos))
    before = sorted(empty.rglob('*'))
    assert said in told(capsys, things, f'my_things.py {command}')
    assert sorted(empty.rglob('*')) == before


def test_photos_that_none_can_be_read_are_told(
    things: Things, empty: Path, capsys: pytest.CaptureFixture
) -> None:
    (empty / 'empty' / 'a.jpg').touch()
    error = told(capsys, things, f'my_things.py CHECKPOINT {empty}/empty -o {empty}/o.json')
    assert '1 of 1 photos can not be read' in error
    assert torch.is_grad_enabled()

"""The page about a run: what it is made of, and that it holds it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Optional

import cv2
import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from mmengine.structures import InstanceData

from mmdet_gdino_lora.commands.thresholds import lowest_scores
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.report import page
from mmdet_gdino_lora.report.collect import Run, curves, read_logs, read_run
from mmdet_gdino_lora.report.detect import Seen
from mmdet_gdino_lora.report.measure import LEFT_OUT, NONE, Measurement, best_threshold
from mmdet_gdino_lora.report.pictures import best_and_worst
from tests.tool_run import Things, run_typed

NAMES = ('cat', 'dog', 'bird')
EVIL = '<script>alert(1)</script>'
WITHOUT_END = ('meta', 'rect', 'image', 'use', 'line', 'circle', 'polyline')


class Page(HTMLParser):
    """What a browser reads: tags that are closed in order, their attributes, the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, Optional[str]]] = []
        self.text = ''
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in WITHOUT_END:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(truth: list, found: list, ignored: tuple = (), path: str = '') -> Seen:
    """An image: truth as (label, x), detections as (label, x, score), boxes of 10 by 10."""

    def boxes(of: list) -> np.ndarray:
        return np.array([[x, 0, x + 10, 10] for _, x, *_ in of], dtype=float).reshape(-1, 4)

    return Seen(
        path=path,
        size=(100, 20),
        truth=boxes(truth),
        labels=np.array([label for label, _ in truth], dtype=int),
        ignored=np.array([place in ignored for place in range(len(truth))], dtype=bool),
        boxes=boxes(found),
        found=np.array([label for label, *_ in found], dtype=int),
        scores=np.array([score for *_, score in found], dtype=float),
    )


#: cat: right at .9, wrong at .8, right at .7, wrong at .2; dog: taken for a cat, and missed; bird:
#: invented.
HAND_MADE = [
    seen([(0, 0), (1, 20)], [(0, 0, 0.9), (0, 21, 0.8), (2, 60, 0.6)]),
    seen([(0, 40), (1, 80)], [(0, 41, 0.7), (0, 0, 0.2), (1, 20, 0.1)]),
]


# ------------------------------------------------------------------------------------- thresholds


def f1_of(scores: np.ndarray, right: np.ndarray, boxes: int, lowest: float) -> float:
    kept = scores >= lowest
    return 2 * right[kept].sum() / (kept.sum() + boxes)


def test_the_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        size, missed = rng.integers(1, 12), rng.integers(0, 4)
        scores = rng.integers(1, 8, size) / 8  # some are equal
        right = rng.random(size) < 0.5
        boxes = int(right.sum() + missed)
        found = best_threshold(scores, right, boxes)
        f1 = partial(f1_of, scores, right, boxes)
        best = max(f1(lowest) for lowest in scores)
        if found is None:
            assert best == 0
            continue
        kept = scores >= found.score
        assert f1(found.score) == found.f1 == best
        assert found.precision == right[kept].mean() and found.recall == right[kept].sum() / boxes
        higher = scores[scores > scores[kept].min()]
        assert all(f1(lowest) < best for lowest in higher)


def test_the_threshold_lies_in_the_middle() -> None:
    found = best_threshold(np.array([0.2, 0.9, 0.6]), np.array([False, True, True]), 2)
    assert found is not None and found.score == pytest.approx(0.4)
    assert best_threshold(np.array([0.5]), np.array([False]), 1) is None
    assert best_threshold(np.array([]), np.array([], dtype=bool), 1) is None


def test_each_class_has_its_own() -> None:
    cat, dog, bird = Measurement(HAND_MADE, NAMES).classes
    assert cat.threshold is not None
    assert cat.threshold.score == pytest.approx(0.45)
    assert (cat.threshold.precision, cat.threshold.recall) == (pytest.approx(2 / 3), 1)
    assert (dog.boxes, dog.ap, dog.threshold) == (2, 0, None)
    assert (bird.boxes, bird.ap, bird.threshold) == (0, None, None)


def test_ap_is_that_of_mmdets_metric(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    images = []
    for _ in range(6):
        truth = [(int(rng.integers(3)), float(x)) for x in (0, 20, 40, 60)]
        found = [
            (int(rng.integers(3)) if rng.random() < 0.3 else label, x + rng.normal(0, 1.5), score)
            for label, x in truth
            for score in rng.random(2)
        ]
        images.append(seen(truth, found, ignored=(0,)))
    metric = CocoMetric(classwise=True, outfile_prefix=str(tmp_path / 'coco'))
    metric.dataset_meta = dict(classes=NAMES)
    for number, image in enumerate(images):
        corners = image.truth.tolist()
        instances = [
            dict(bbox=b, bbox_label=int(label), ignore_flag=int(ignored))
            for b, label, ignored in zip(corners, image.labels, image.ignored)
        ]
        of_image = dict(
            img_id=number,
            ori_shape=(20, 100),
            instances=instances,
            pred_instances=_tensors(image),
        )
        metric.process({}, [of_image])
    expected = metric.evaluate(len(images))
    measured = Measurement(images, NAMES)
    assert measured.mean == pytest.approx(expected['coco/bbox_mAP'], abs=6e-4)
    for of_class in measured.classes:
        name = f'coco/{of_class.name}_precision'
        assert of_class.ap == pytest.approx(expected[name], abs=6e-4)
        assert 0 < of_class.ap < 1


def _tensors(image: Seen) -> dict:
    found = InstanceData(
        bboxes=torch.tensor(image.boxes),
        scores=torch.tensor(image.scores),
        labels=torch.tensor(image.found),
    )
    return {name: found[name] for name in ('bboxes', 'scores', 'labels')}


# -------------------------------------------------------------------------------------- confusion


def test_confusion_counts() -> None:
    measured = Measurement(HAND_MADE, NAMES)
    first, second = verdicts = measured.verdicts()
    assert first.found.tolist() == [0, 1, NONE] and first.truth.tolist() == [0, 1]
    assert second.found.tolist() == [0, LEFT_OUT, LEFT_OUT] and second.truth.tolist() == [0, NONE]
    assert measured.confusion(verdicts).tolist() == [
        [2, 0, 0, 0],
        [1, 0, 0, 1],  # a dog taken for a cat, and one missed
        [0, 0, 0, 0],
        [0, 0, 1, 0],  # a bird invented
    ]


def test_crowds_count_for_nothing() -> None:
    image = seen([(0, 0), (0, 50)], [(0, 0, 0.9), (0, 50, 0.8)], ignored=(1,))
    measured = Measurement([image], NAMES)
    (verdict,) = measured.verdicts()
    assert verdict.found.tolist() == [0, LEFT_OUT]
    assert measured.confusion([verdict]).sum() == 1 and measured.classes[0].boxes == 1


def test_what_is_seen_twice_is_invented_once() -> None:
    measured = Measurement([seen([(0, 0)], [(0, 0, 0.9), (0, 1, 0.9)])], NAMES)
    assert measured.confusion(measured.verdicts())[:, 0].tolist() == [1, 0, 0, 1]


# ------------------------------------------------------------------------------------------- logs


def log(folder: Path, steps: range, loss: float, validations: dict[int, int]) -> str:
    """Writes a start's log: a line for each step, and validations after some, by epoch."""
    folder.mkdir(parents=True)
    lines = []
    for step in steps:
        lines.append(dict(lr=0.1, loss=loss, step=step))
        if step in validations:
            lines.append({'coco/bbox_mAP': loss / 10, 'step': validations[step]})
    text = ''.join(json.dumps(line) + '\n' for line in lines)
    (folder / 'scalars.json').write_text(text + '{"lr": 0.1, "lo')  # killed while it wrote
    (folder / '2026.json').write_text(text)
    return str(folder)


def test_logs_of_resumed_runs_are_joined(tmp_path: Path) -> None:
    first = log(tmp_path / 'a', range(1, 8), 2.0, {2: 1, 4: 2, 6: 3})
    test = tmp_path / 'b'
    test.mkdir()
    (test / 'scalars.json').write_text('{"coco/bbox_mAP": 0.9, "step": 0}\n')
    second = log(tmp_path / 'c', range(5, 9), 1.0, {6: 3, 8: 4})
    training, validation = read_logs([first, str(test), second])
    assert [(line['step'], line['loss']) for line in training] == [
        *((step, 2.0) for step in (1, 2, 3, 4)),
        *((step, 1.0) for step in (5, 6, 7, 8)),
    ]
    expected = [(1, 0.2), (2, 0.2), (3, 0.1), (4, 0.1)]
    assert curves(validation, '.*mAP') == {'coco/bbox_mAP': expected}


def test_a_run_that_began_anew_stands_alone(tmp_path: Path) -> None:
    logs = [log(tmp_path / name, range(1, 4), loss, {}) for name, loss in (('a', 2.0), ('b', 1.0))]
    training, _ = read_logs(logs)
    assert curves(training, 'loss') == {'loss': [(1, 1.0), (2, 1.0), (3, 1.0)]}


def test_curves_are_thinned_and_have_no_holes() -> None:
    lines = [dict(step=s, loss=s if s != 3 else float('nan'), lr=0.1) for s in range(1, 7)]
    assert curves(lines, 'loss') == {'loss': [(s, s) for s in (1, 2, 4, 5, 6)]}
    assert curves(lines, 'loss', points=3) == {'loss': [(2, 1.5), (5, 4.5), (6, 6.0)]}


# ------------------------------------------------------------------------------------------- page


@pytest.fixture(scope='module')
def folder(things: Things, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run's folder, with a report of it."""
    folder = tmp_path_factory.mktemp('report') / 'a run'
    shutil.copytree(things.folder / 'work_dirs/my_things', folder)
    run_typed(f"gdino-lora report '{folder}' --scales 0 1 --old-config my_things.py", things.folder)
    return folder


def test_a_runs_page_has_every_part(folder: Path) -> None:
    html = (folder / 'report.html').read_text(encoding='utf-8')
    read = Page(html)
    ids = {value for name, value in read.attributes if name == 'id'}
    parts = {'trained', 'curves', 'classes', 'scales', 'worst', 'best', 'confusion', 'next'}
    assert parts <= ids
    for told in (
        'preset decoder, rank 16',
        'base.pth (fingerprint ',
        '2 images, 4 boxes',
        '2: wheel bolt, cracked tile',
        'epoch_1.pth',
        'by mmdet-gdino-lora ',
        'Loss in training',
        'Its parts, last decoder layer',
        'what the base knew',
        'Loss in validation',
        'missed',
        'invented',
    ):
        assert told in read.text, told
    scores = json.loads((folder / 'thresholds.json').read_text())
    assert list(scores) == ['wheel bolt', 'cracked tile']
    pictures = re.findall(r'href="data:image/jpeg;base64,([^"]+)"', html)
    assert len(pictures) == 2  # one of the two images is the best, the other the worst
    for picture in pictures:
        jpeg = np.frombuffer(base64.b64decode(picture), np.uint8)
        assert cv2.imdecode(jpeg, cv2.IMREAD_COLOR).shape == (64, 64, 3)


def test_the_page_needs_nothing_from_elsewhere(folder: Path) -> None:
    html = (folder / 'report.html').read_text(encoding='utf-8')
    read = Page(html)
    for name, value in read.attributes:
        if name.rpartition(':')[2] in ('href', 'src', 'srcset', 'action', 'data', 'poster'):
            assert value is not None and value.startswith(('#', 'data:image/jpeg;base64,'))
    assert not set(read.tags) & {'script', 'link', 'iframe', 'object', 'embed', 'base'}
    assert not re.search(r'https?:|url\(|@import|@font-face', html)


def test_pictures_have_words(folder: Path) -> None:
    html = (folder / 'report.html').read_text(encoding='utf-8')
    for picture in re.findall('<svg[^>]*>', html):
        assert re.search('aria-label="[^"]{5,}"|aria-hidden="true"', picture), picture
    for kind in ('Truth: ', 'Found: '):
        assert f'aria-label="{kind}' in html


def test_the_commands_that_come_next_run(folder: Path, things: Things) -> None:
    html = (folder / 'report.html').read_text(encoding='utf-8')
    (after,) = re.findall('<h2 id="next">.*', html, flags=re.S)
    lines = Page(after.partition('</main>')[0]).text.splitlines()
    commands = [line for line in lines if line.startswith('gdino-lora ')]
    for name in ('test', 'image-demo', 'export', 'merge'):
        (command,) = [line for line in commands if line.startswith(f'gdino-lora {name} ')]
        run_typed(command, things.folder)
    assert (folder / 'tuned.pth').is_file() and (folder / 'tuned_adapter').is_dir()


def test_what_files_say_is_escaped(tmp_path: Path) -> None:
    path = tmp_path / f'{EVIL.replace("/", "")}.png'
    cv2.imwrite(str(path), np.zeros((20, 100, 3), np.uint8))
    names = (EVIL, '"><img src=x onerror=alert(2)>')
    images = [seen([(0, 0), (1, 20)], [(0, 0, 0.9), (1, 60, 0.8)], path=str(path))]
    measured = Measurement(images * 2, names)
    verdicts = measured.verdicts()
    best, worst = best_and_worst(measured, verdicts, 4)
    lines = [{'step': 1, 'lr': 0.1, 'loss': 1.0, f'loss_retain{EVIL}': 1.0}]
    run = Run(EVIL, EVIL, EVIL, lines, [{'step': 1, f'{EVIL}/AP': 0.5}])
    out = tmp_path / 'report.html'
    page.write(
        str(out),
        measured,
        title=EVIL,
        facts=[(EVIL, EVIL)],
        trained_boxes=None,
        charts=page.charts(run, True),
        best=best,
        worst=worst,
        scales=None,
        scale_rows=[],
        confusion=page.confusion(measured.confusion(verdicts), names),
        thresholds=EVIL,
        commands=page.commands(run, names, EVIL),
    )
    read = Page(out.read_text(encoding='utf-8'))
    assert not set(read.tags) & {'script', 'img'}
    assert read.text.count(EVIL) > 10
    assert not [name for name, _ in read.attributes if name.startswith('on')]


def test_classes_metrics_are_in_the_table_alone() -> None:
    names = ('mAP', 'mAP_50', 'mAP_s', 'cat_precision', 'loss_mAP')
    run = Run('', '', '', [], [{f'coco/bbox_{name}': 0.5 for name in names} | {'step': 1}])
    (figure,) = page.charts(run, True)
    assert re.findall(r'</svg> (\S+) <small>', figure) == ['coco/bbox_mAP', 'coco/bbox_mAP_50']


def test_many_classes_leave_rows_out() -> None:
    table = np.diag(np.arange(41))
    table[-1, -1] = 0
    table[7, 9] = 3
    shown = page.confusion(table, [f'class {number}' for number in range(40)])
    assert shown['left_out'] == 10 and {'class 7', 'class 9'} <= set(shown['names'])
    assert [len(cells) for _, cells in shown['rows']] == [31] * 30 + [30]


# --------------------------------------------------------------------------------------- mistakes


def test_a_folder_that_is_no_runs_is_told(tmp_path: Path) -> None:
    def told(expected: str, checkpoint: Optional[str] = None) -> None:
        with pytest.raises(ConfigError, match=expected):
            read_run(str(tmp_path / 'run'), checkpoint)

    told('no such folder')
    run = tmp_path / 'run'
    run.mkdir()
    told('holds no training run')
    log(run / '20260101/vis_data', range(1, 3), 1.0, {})
    told('holds no config')
    (run / 'mine.py').touch()
    told('holds no checkpoint')
    told("--checkpoint 'x.pth': no such file", 'x.pth')
    (run / 'epoch_2.pth').touch()
    (run / 'epoch_1.pth').touch()
    (run / 'last_checkpoint').write_text('/elsewhere/run/epoch_2.pth')
    found = read_run(str(run))
    assert (found.config, found.checkpoint) == (str(run / 'mine.py'), str(run / 'epoch_2.pth'))
    (run / 'best_coco_epoch_1.pth').touch()
    assert read_run(str(run)).checkpoint == str(run / 'best_coco_epoch_1.pth')


@pytest.mark.parametrize(
    ('added', 'told'),
    [
        ('val_dataloader = val_evaluator = val_cfg = None', 'val_dataloader is not set'),
        ("val_dataloader['dataset']['ann_file'] = 'gone.json'", 'val_dataloader.dataset.ann_file'),
    ],
)
def test_a_config_without_validation_is_told(
    added: str,
    told: str,
    folder: Path,
    things: Things,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    shutil.copy(things.checkpoint, tmp_path)
    text = (folder / 'my_things.py').read_text()
    (tmp_path / 'my_things.py').write_text(f'{text}\n{added}\n')
    with pytest.raises(SystemExit) as end:
        run_typed(f'gdino-lora report {tmp_path}', things.folder)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.startswith(f'error: {told}')


def test_image_demo_takes_the_thresholds(
    things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / 'thresholds.json'
    shown = {}
    for lowest in (0, 1.1):
        path.write_text(json.dumps({'wheel bolt': lowest, 'cracked tile': None}))
        capsys.readouterr()
        things.run(
            'gdino-lora image-demo my_things.py CHECKPOINT photo.jpg --score-thr 1.1'
            f' --texts "wheel bolt . cracked tile" --thresholds {path}'
        )
        shown[lowest] = capsys.readouterr().out
    assert 'wheel bolt  0.' in shown[0] and 'cracked tile  ' not in shown[0]
    assert 'nothing with a score' in shown[1.1]


@pytest.mark.parametrize(
    ('content', 'told'),
    [(None, 'No such file'), ('{', 'Expecting'), ('[1]', 'is no number'), ('{"cow": 1}', 'cow')],
)
def test_thresholds_that_are_none_are_told(
    content: Optional[str], told: str, tmp_path: Path
) -> None:
    path = tmp_path / 'thresholds.json'
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=told):
        lowest_scores(str(path), ['cat'], 0.3)

"""Labels that may be missing: guessed where a detector knows the class, and nowhere else."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import numpy as np
import pytest

from mmdet_gdino_lora.checks.coco_file import CocoFile
from mmdet_gdino_lora.datasets.shapes import Split, write_shapes
from mmdet_gdino_lora.labelling.detections import Found
from mmdet_gdino_lora.labelling.missing import Counted, count_beside, findings_of, sample_of
from tests.tool_run import run_tool

NAMES = ('bolt', 'nut')


def counted(
    labelled: Sequence[float],
    free: Sequence[float] = (),
    mistaken: Sequence[float] = (),
    unseen: int = 0,
) -> Counted:
    """What is found of a class, by scores; and labels that are not found again."""
    photos = [(score, f'{place}.jpg', [1.0, 2.0, 10.0, 20.0]) for place, score in enumerate(free)]
    number = len(labelled) + unseen
    return Counted('bolt', number, list(labelled), photos, list(mistaken))


def sentence(one: Counted) -> Optional[str]:
    """What is said of a class, if anything."""
    told = list(findings_of('train.json', 'photos', [one], 50, 'the base'))
    assert not any(finding.fatal for finding in told)
    return told[0].sentence if told else None


#: Scores of a detector that is sure of what it knows: the same spread, few or many.
def sure(count: int) -> list[float]:
    return np.linspace(0.45, 0.9, count).tolist()


def test_what_is_found_as_surely_as_the_labels_is_told_as_a_guess() -> None:
    told = sentence(counted(sure(40), sure(40), unseen=2))
    assert told is not None and told.startswith("train.json: labels of 'bolt' seem to be missing")
    (number,) = re.findall('some ([0-9]+) beside 42 in 50 photos', told)
    assert 34 <= int(number) <= 44
    assert 'a guess of the base' in told and "40 of 42 labelled boxes of 'bolt'" in told
    assert told.endswith("first: photos/39.jpg, 'bolt' at (1, 2) to (11, 22) (score 0.90)")


@pytest.mark.parametrize(
    'silent',
    [
        counted(sure(40)),
        counted(sure(40), sure(3)),  # few, which a sure detector gets wrong
        counted(sure(15), sure(15)),  # too few labels to tell
        counted(sure(40), sure(40), unseen=30),  # it misses many labels
        counted([score / 3 for score in sure(40)], sure(40)),  # it is not sure of the labels
        counted(sure(40), sure(40), mistaken=sure(20)),  # it takes others for them
        counted(sure(40), np.linspace(0.1, 0.7, 300).tolist()),  # mistakes, which grow
        counted([], sure(40)),
    ],
    ids=['whole', 'few', 'labels', 'misses', 'unsure', 'confuses', 'mistakes', 'none'],
)  # fmt: skip
def test_without_evidence_nothing_is_said(silent: Counted) -> None:
    assert sentence(silent) is None


def test_detections_are_held_against_the_labels_of_their_photo() -> None:
    def box(number: int, category: int, x: float, **more: int) -> dict:
        return dict(id=number, image_id=7, category_id=category, bbox=[x, 0, 10, 10], **more)

    images = [dict(id=7, file_name='a.jpg'), dict(id=8, file_name='b.jpg')]
    boxes = [box(1, 1, 0), box(2, 2, 20), box(3, 1, 40, iscrowd=1), box(4, 3, 80)]
    categories = [dict(id=place, name=name) for place, name in enumerate([*NAMES, 'rust'], 1)]
    coco = CocoFile('', '', images, boxes, categories)
    found = {
        'a.jpg': Found(
            100,
            100,
            boxes=[[x, 0, 10, 10] for x in (0, 20, 40, 60, 80)],
            scores=[0.9, 0.8, 0.7, 0.6, 0.5],
            labels=[0, 0, 0, 0, 1],  # right, a nut, in a crowd, free; and on rust
        ),
        'b.jpg': Found(unreadable='is empty'),
    }
    bolt, nut = count_beside(coco, images, found, NAMES)
    assert (bolt.labels, bolt.on_labels, bolt.mistaken) == (1, [0.9], [0.8])
    assert bolt.free == [(0.6, 'a.jpg', [60, 0, 10, 10])]
    assert (nut.labels, nut.on_labels, nut.free, nut.mistaken) == (1, [], [], [0.5])


def test_the_sample_is_the_same_every_time() -> None:
    images = [dict(file_name=f'{place}.jpg') for place in range(50)]
    chosen = sample_of(images, 20)
    assert chosen == sample_of(images, 20) and len(chosen) == 20
    assert chosen != images[:20] and sample_of(images[:5], 20) == images[:5]


# --------------------------------------------------------------------- the base of the drawn shapes

#: Two classes that it knows, and one whose words it never saw.
SHAPES = ('red circle', 'green square', 'purple star')
CONFIG = """
_base_ = 'mmdet_gdino_lora::gdino_lora_shapes.py'
metainfo = dict(classes={classes!r})
data = dict(data_root='shapes/', ann_file='annotations/{name}.json', metainfo=metainfo,
            data_prefix=dict(img='photos/'))
train_dataloader = dict(dataset=data, num_workers=0, persistent_workers=False)
val_dataloader = dict(dataset=data, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
model = dict(retain=None)
"""


@pytest.fixture(scope='module')
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos with half of the red circles' labels, and all of the others'."""
    folder = tmp_path_factory.mktemp('drawn')
    write_shapes(folder / 'shapes', splits=dict(photos=Split(SHAPES, 50)))
    path = folder / 'shapes/annotations/photos.json'
    content = json.loads(path.read_text())
    rng = np.random.default_rng(0)
    left = [box for box in content['annotations'] if box['category_id'] > 1 or rng.random() < 0.5]
    path.with_name('left.json').write_text(json.dumps(dict(content, annotations=left)))
    (folder / 'left.py').write_text(CONFIG.format(classes=SHAPES, name='left'))
    return folder


def boxes_of(path: Path) -> Counter[int]:
    """Boxes by category."""
    return Counter(box['category_id'] for box in json.loads(path.read_text())['annotations'])


def test_the_base_guesses_at_what_is_missing_of_what_it_knows(
    drawn: Path, capsys: pytest.CaptureFixture
) -> None:
    run_tool('python tools/check_dataset.py left.py --missing-labels', drawn)
    said = capsys.readouterr().out
    rows = {
        shape: re.findall(
            rf'^{shape} .*(none seen|too few to tell|some \d+|not known)$', said, re.M
        )
        for shape in SHAPES
    }
    assert rows['purple star'] == ['not known']
    assert rows['green square'][0] in ('none seen', 'too few to tell')
    ((shape, guessed),) = re.findall(r"labels of '(.*?)' seem to be missing, some (\d+)", said)
    assert shape == 'red circle' and rows[shape] == [f'some {guessed}']
    whole, left = (boxes_of(drawn / f'shapes/annotations/{n}.json') for n in ('photos', 'left'))
    assert 0.6 * (whole - left)[1] < int(guessed) < 1.4 * (whole - left)[1]
    assert re.search(r'first: shapes/photos/\d+.jpg, .red circle. at \(\d+, \d+\) to', said)
    assert 'a guess of the base (adapters off)' in said


def test_a_detector_that_cannot_be_had_is_told_first(
    drawn: Path, capsys: pytest.CaptureFixture
) -> None:
    for arguments, told in (
        ('--missing-labels gone.pth', "checkpoint 'gone.pth': no such file"),
        ('--missing-labels --cfg-options model.base_checkpoint=None', 'would be random weights'),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_tool(f'python tools/check_dataset.py left.py {arguments}', drawn)
        out, error = capsys.readouterr()
        assert end.value.code == 2 and told in error and 'images' not in out

"""The benchmark of completed labels: what it takes away, what it counts, what it asks the tools."""

from __future__ import annotations

import importlib
import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from mmdet_gdino_lora.commands.common import read_config

BENCHMARKS = Path(__file__).resolve().parents[1] / 'tools' / 'benchmarks'


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module('completion')


def box(image: int, category: int, x: float, **more) -> dict:
    return dict(image_id=image, category_id=category, bbox=[x, 0, 10, 10], **more)


def test_half_of_the_boxes_go_others_with_another_seed(benchmark):
    truth = dict(images=[dict(id=1)], annotations=[dict(id=number) for number in range(1000)])
    left, removed = benchmark.without_some(truth, 0)
    assert 450 < len(removed) < 550 and left['images'] == truth['images']
    assert sorted(b['id'] for b in left['annotations'] + removed) == list(range(1000))
    assert benchmark.without_some(truth, 0)[1] == removed != benchmark.without_some(truth, 1)[1]


def test_a_box_is_right_on_one_removed_box_of_its_class_and_image(benchmark):
    removed = [box(1, 1, 0), box(1, 1, 20), box(2, 1, 50), box(1, 2, 70)]
    added = [
        box(1, 1, 1, score=0.5),  # right
        box(1, 1, 2, score=0.4),  # on the same
        box(1, 1, 28, score=0.9),  # too far off
        box(1, 1, 50, score=0.9),  # another image's
        box(1, 1, 70, score=0.9),  # another class's
        box(1, 2, 71, score=0.1),  # right
    ]
    assert benchmark.count_right(added, removed) == 2
    assert benchmark.count_right([], removed) == benchmark.count_right(added, []) == 0


def test_the_table_says_what_came_back(benchmark):
    one = dict(ap=dict(full=0.6, missing=0.4, completed=0.55), added=40, right=38)
    other = dict(ap=dict(full=0.6, missing=0.2, completed=0.35), added=20, right=20)
    rows = [dict(row, boxes=100, removed=50) for row in (one, other)]
    assert benchmark.table(rows).splitlines() == [
        '| | boxes | AP | won back |',
        '|---|--:|--:|--:|',
        '| full | 100 | 0.600 ± 0.000 |  |',
        '| missing | 50 | 0.300 ± 0.141 |  |',
        '| completed | 80 | 0.450 ± 0.141 | 50% |',
        '',
        '58 of 60 added boxes are right (96.7%); of the removed ones 58% are there again',
    ]


def test_its_tools_are_asked_for_what_there_is(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, 'TESTED', 2)
    asked = []

    def tool(name: str, *argv: object) -> None:
        words = [str(word) for word in argv]
        asked.append(name)
        if name == 'label':
            parser = importlib.import_module('mmdet_gdino_lora.commands.label').own_parser()
            args = parser.parse_args(words)
            content = json.loads(Path(args.complete).read_text())
            truth = json.loads((Path(args.complete).parent / 'full.json').read_text())
            gone = [b for b in truth['annotations'] if b not in content['annotations']]
            content['annotations'].append(dict(gone[0], completed=True, score=0.5))
            Path(args.out).write_text(json.dumps(content))
            return
        parser = importlib.import_module('mmdet_gdino_lora.commands.common').parser('')
        args = parser.parse_args(words)
        cfg = read_config(args.config, args.cfg_options, args.work_dir)
        file = Path(cfg.train_dataloader.dataset.ann_file)
        assert file.is_file() and cfg.train_cfg.max_epochs == cfg.param_scheduler[1].end == 5
        scales = [step.get('scale') for step in cfg.test_dataloader.dataset.pipeline]
        assert (96, 96) in scales
        asked[-1] = file.stem
        log = Path(args.work_dir) / '20200101' / 'vis_data' / 'scalars.json'
        log.parent.mkdir(parents=True)
        ap = dict(full=0.6, missing=0.4).get(file.stem, 0.5)
        log.write_text(json.dumps(dict(lr=1)) + '\n' + json.dumps({'coco/bbox_mAP': ap}) + '\n')
        (Path(args.work_dir) / 'last_checkpoint').write_text(f'{args.work_dir}/epoch_5.pth')
        (Path(args.work_dir) / 'epoch_5.pth').touch()

    monkeypatch.setattr(benchmark, 'tool', tool)
    out = tmp_path / 'out'
    command = f'completion.py --images 4 --epochs 5 --seeds 0 --out {out}'
    monkeypatch.setattr('sys.argv', shlex.split(command))
    benchmark.main()
    assert asked == ['full', 'missing', 'label', 'completed']
    said = capsys.readouterr().out
    assert '1 of 1 added boxes are right (100.0%)' in said and '| 0.500 | 50% |' in said
    benchmark.main()  # all of it is there
    assert len(asked) == 4

"""What completed labels bring: half of a training set's boxes removed, found again, trained from.

    python tools/benchmarks/completion.py [--photos FOLDER] [--seeds 0 1 2]

Without --photos: `--images` images of the shapes' new classes at 96 pixels; with it a folder of
labelled photos, as `new-config FOLDER --base shapes` takes it. For each seed, with the tools that
people type:

    full       train on all boxes, measure
    missing    take half of the boxes away by chance, train, measure; photos that lose all of theirs
               stay in the file, as label tools export what nobody got to, and teach background
    completed  label --complete with the detector of `missing`, train on its file, measure

Prints AP, which share came back of what the missing boxes cost, how many of the added boxes are
right (IoU of 0.5 or more with a removed box of their class, which counts for one of them), and how
many of the removed boxes are there again. What was measured stays in `--out`, so that a run
that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tables import spread  # noqa: E402

from gdino_lora import run  # noqa: E402

RAW = argparse.RawDescriptionHelpFormatter
#: Share of the boxes that are taken away.
REMOVED = 0.5
#: Images of shapes to measure on.
TESTED = 100
SHAPES = """\
_base_ = 'mmdet_gdino_lora::gdino_lora_shapes.py'
model = dict(retain=None)
data_root = {root!r}
train_pipeline, test_pipeline = (
    [dict(step, scale=(96, 96)) if step['type'] == 'Resize' else step for step in steps]
    for steps in (_base_.train_pipeline, _base_.test_pipeline)
)
train_dataloader = dict(dataset=dict(data_root=data_root, pipeline=train_pipeline))
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        pipeline=test_pipeline,
        ann_file='annotations/new_test.json',
        data_prefix=dict(img='new_test/'),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/new_test.json')
test_evaluator = val_evaluator
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument('--photos', help='folder of labelled photos; default: drawn shapes')
    parser.add_argument('--images', type=int, default=200, help='of shapes to train from')
    parser.add_argument('--epochs', type=int, default=3)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--right', type=float, default=0.95, help='as of `label`')
    parser.add_argument('--out', default='work_dirs/completion')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='of all runs')
    args = parser.parse_args()
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    config = of_photos(args.photos, out) if args.photos else of_shapes(args.images, out)
    rows = [measured(config, out / f'seed_{seed}', seed, args) for seed in args.seeds]
    print(table(rows))


def of_shapes(images: int, out: Path) -> Path:
    """Draws shapes, and writes a config that trains on them."""
    from mmdet_gdino_lora.datasets.shapes import NEW_CLASSES, Split, write_shapes

    splits = {'new_train': Split(NEW_CLASSES, images), 'new_test': Split(NEW_CLASSES, TESTED)}
    root = write_shapes(out / 'shapes', splits=splits)
    config = out / 'shapes.py'
    config.write_text(SHAPES.format(root=f'{root}/'))
    return config


def of_photos(photos: str, out: Path) -> Path:
    """Writes a config for a folder of photos, on the base of drawn shapes."""
    config = out / 'photos.py'
    if not config.is_file():
        tool('new_config', photos, '-o', config, '--base', 'shapes')
    return config


def measured(config: Path, folder: Path, seed: int, args: argparse.Namespace) -> dict:
    """Everything about one seed."""
    from mmdet_gdino_lora.commands.common import read_config

    data = read_config(str(config)).train_dataloader.dataset
    root = Path(data.get('data_root') or '')
    truth = json.loads((root / data.ann_file).read_text())
    folder.mkdir(exist_ok=True)
    left, removed = without_some(truth, seed)
    (folder / 'full.json').write_text(json.dumps(truth))
    (folder / 'missing.json').write_text(json.dumps(left))
    ap = {name: trained(config, folder, name, seed, args) for name in ('full', 'missing')}
    completed = folder / 'completed.json'
    if not completed.is_file():
        checkpoint = (folder / 'missing' / 'last_checkpoint').read_text()
        photos = root / data.data_prefix.img
        asked = ['-o', completed, '--complete', folder / 'missing.json', '--overwrite']
        asked += ['--right', args.right, '--batch-size', 8]
        tool('label', config, checkpoint, photos, *asked)
    ap['completed'] = trained(config, folder, 'completed', seed, args)
    boxes = json.loads(completed.read_text())['annotations']
    added = [box for box in boxes if box.get('completed')]
    counts = dict(boxes=len(truth['annotations']), removed=len(removed), added=len(added))
    result = dict(seed=seed, ap=ap, **counts, right=count_right(added, removed))
    print(result, flush=True)
    return result


def without_some(truth: dict, seed: int) -> tuple[dict, list[dict]]:
    """Takes boxes away: the content without them, and these."""
    gone = np.random.default_rng(seed).random(len(truth['annotations'])) < REMOVED
    left = [box for box, is_gone in zip(truth['annotations'], gone) if not is_gone]
    removed = [box for box, is_gone in zip(truth['annotations'], gone) if is_gone]
    return {**truth, 'annotations': left}, removed


def trained(config: Path, folder: Path, name: str, seed: int, args: argparse.Namespace) -> float:
    """Trains on one of the files, unless that was done; AP of the last epoch."""
    work_dir, epochs = folder / name, args.epochs
    if not (work_dir / f'epoch_{epochs}.pth').is_file():
        own = [
            f'train_dataloader.dataset.ann_file={folder / name}.json',
            f'randomness.seed={seed}',
            f'train_cfg.max_epochs={epochs}',
            f'train_cfg.val_interval={epochs}',
            f'param_scheduler.1.end={epochs}',
            'default_hooks.checkpoint.type=CheckpointHook',
            f'default_hooks.checkpoint.interval={epochs}',
            'default_hooks.checkpoint.save_best=None',
            *(f'{part}_dataloader.num_workers=0' for part in ('train', 'val')),
            *(f'{part}_dataloader.persistent_workers=False' for part in ('train', 'val')),
        ]
        tool('train', config, '--work-dir', work_dir, '--cfg-options', *own, *args.cfg_options)
    log = max(work_dir.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return next(line['coco/bbox_mAP'] for line in lines if 'coco/bbox_mAP' in line)


def tool(name: str, *argv: object) -> None:
    """Runs one of the tools."""
    command = [sys.executable, ROOT / 'tools' / f'{name}.py', *argv]
    subprocess.run([str(word) for word in command], check=True)


def count_right(added: list[dict], removed: list[dict]) -> int:
    """How many of the added boxes lie on a removed one of their class, the surest first."""
    from mmdet_gdino_lora.labelling.detections import overlaps

    there = defaultdict(list)
    for box in removed:
        there[box['image_id'], box['category_id']].append(box['bbox'])
    right = 0
    for box in sorted(added, key=lambda box: -box['score']):
        boxes = there[box['image_id'], box['category_id']]
        shared = overlaps([box['bbox']], boxes)[0]
        if shared.max(initial=0) >= 0.5:
            boxes.pop(int(shared.argmax()))
            right += 1
    return right


def table(rows: list[dict]) -> str:
    """AP and boxes over the seeds, as Markdown, and what completion is judged by."""
    kept = {'full': 0, 'missing': -1, 'completed': -1}
    again = {'full': 0, 'missing': 0, 'completed': 1}
    aps = {name: np.array([row['ap'][name] for row in rows]) for name in rows[0]['ap']}
    lines = ['| | boxes | AP | won back |', '|---|--:|--:|--:|']
    for name, values in aps.items():
        boxes = statistics.mean(
            row['boxes'] + kept[name] * row['removed'] + again[name] * row['added'] for row in rows
        )
        back = ''
        if again[name]:
            back = f'{(values - aps["missing"]).sum() / (aps["full"] - aps["missing"]).sum():.0%}'
        lines.append(f'| {name} | {boxes:.0f} | {spread(values.tolist())} | {back} |')
    added, right, removed = (sum(row[key] for row in rows) for key in ('added', 'right', 'removed'))
    said = (
        f'{right} of {added} added boxes are right ({right / max(added, 1):.1%}); of the removed '
        f'ones {right / removed:.0%} are there again'
    )
    return '\n'.join([*lines, '', said])


if __name__ == '__main__':
    run(main)

"""What kept features cost and teach, beside features that are computed in every step.

    python tools/benchmarks/frozen_features.py [--parts step time learning] [--out FOLDER]

step: seconds of a step at Swin-T's size, as `ours, decoder` in step.py, with random weights and
80 names; reading from disk is part of a step, reading images is none of the other's.

The other two train the demo's model (configs/gdino_lora_shapes.py), preset `decoder`, no `retain`,
batch 8, with mmdet's augmentation at the demo's image size: flip, and one of a resize or
a resize, a crop and a resize.

time: seconds of an epoch of 104 images behind the first, in one process in turns, loading included
(without workers, so that nothing is done beside the step).

learning: 64 images, 20 epochs, AP and AP50 on the new classes' 200 test images, mean and standard
deviation over three seeds, for fresh augmentation and for 2, 4, 8 and 16 views. Each seed draws
views of its own, of which 4 are the first of 8.
What was measured stays in FOLDER, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tables import spread  # noqa: E402

from gdino_lora import run  # noqa: E402
from mmdet_gdino_lora.commands.common import build_runner, read_config  # noqa: E402

CONFIG = str(ROOT / 'configs' / 'gdino_lora_shapes.py')
FRESH, VIEWS = 0, (2, 4, 8, 16)
EPOCHS, IMAGES, TIMED = 20, 64, 104
SIZES = [(size, size) for size in (96, 112, 128, 144, 160)]
RAW = argparse.RawDescriptionHelpFormatter


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument('--parts', nargs='+', default=['step', 'time', 'learning'])
    parser.add_argument('--image', type=int, nargs=2, default=[320, 320])
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--out', default='work_dirs/frozen_features')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument(
        '--cpu-time',
        dest='clock',
        action='store_const',
        const=time.process_time,
        default=time.perf_counter,
        help="the process's own seconds, for a machine that has other work",
    )
    parser.add_argument('--contender', type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        learn(*args.contender, result_path(args.out, *args.contender))
        return
    if 'step' in args.parts:
        print(step_table(tuple(args.image), args.batch, args.rounds, args.clock))
    if 'time' in args.parts:
        print(time_table(Path(args.out), args.rounds, args.clock))
    if 'learning' in args.parts:
        for seed in range(args.seeds):
            for views in (FRESH, *VIEWS):
                if not result_path(args.out, views, seed).is_file():
                    pair = [str(views), str(seed)]
                    command = [sys.executable, __file__, '--out', args.out, '--contender', *pair]
                    subprocess.run(command, check=True)
        print(learning_table(args.out, args.seeds))


def result_path(out: str, views: int, seed: int) -> Path:
    """Where a run's figures lie."""
    return Path(out) / f'views_{views}_seed_{seed}.json'


def settings(
    root: Path, work_dir: Path, views: int, seed: int, epochs: int, images: int, folder: Path
):
    """The run's config; ``views`` of 0: fresh augmentation."""
    options = {'model.lora.preset': 'decoder', 'model.retain': None, 'randomness.seed': seed}
    cfg = read_config(CONFIG, options, str(work_dir))
    cfg.log_level = 'WARNING'
    loader = cfg.train_dataloader
    loader.update(num_workers=0, persistent_workers=False)
    loader.dataset.update(data_root=f'{root}/', indices=images)
    load, pack = loader.dataset.pipeline[:2], loader.dataset.pipeline[4:]
    loader.dataset.pipeline = [*load, *augmentation(), *pack]
    cfg.train_cfg.max_epochs = epochs
    cfg.param_scheduler[1].end = epochs
    cfg.default_hooks.checkpoint.update(interval=-1, save_last=False)
    if views:
        hook = dict(type='FrozenFeaturesHook', views=views, folder=str(folder))
        cfg.default_hooks.frozen_features = hook
    return cfg


def augmentation() -> list[dict]:
    """mmdet's for DETRs, at the demo's size."""
    resize = dict(type='RandomChoiceResize', scales=SIZES, keep_ratio=True)
    crop = dict(
        type='RandomCrop',
        crop_type='absolute_range',
        crop_size=(72, 112),
        allow_negative_crop=True,
    )
    return [
        dict(type='RandomFlip', prob=0.5),
        dict(type='RandomChoice', transforms=[[resize], [resize, crop, resize]]),
    ]


def drawn(out: Path, name: str) -> Path:
    """The shapes under a path of their own: an image's views depend on its path."""
    from mmdet_gdino_lora.datasets.shapes import SPLITS, write_shapes

    shapes = write_shapes(out.resolve() / 'shapes', splits={k: SPLITS[k] for k in USED})
    link = out.resolve() / name
    if not link.is_symlink():
        link.symlink_to(shapes)
    return link


USED = ('new_train', 'new_val', 'new_test')


def learn(views: int, seed: int, path: Path) -> None:
    """Trains once, and writes AP, AP50 and seconds."""
    from mmdet_gdino_lora.commands.demo import evaluate, load_set
    from mmdet_gdino_lora.datasets.shapes import NEW_CLASSES

    path.parent.mkdir(parents=True, exist_ok=True)
    work_dir = path.with_suffix('')
    root, folder = drawn(path.parent, f'seed_{seed}'), path.parent / f'features_{seed}'
    cfg = settings(root, work_dir, views, seed, EPOCHS, IMAGES, folder)
    keys = ('val_dataloader', 'val_evaluator', 'val_cfg')
    validation = {key: cfg.pop(key) for key in keys}
    runner = build_runner(cfg)
    begin = time.time()
    runner.train()
    seconds = time.time() - begin
    validation['val_dataloader']['dataset']['data_root'] = f'{root}/'
    found = evaluate(runner.model, *load_set(validation, f'{root}/', 'new_test', NEW_CLASSES))
    result = dict(ap=found['coco/bbox_mAP'], ap50=found['coco/bbox_mAP_50'], seconds=seconds)
    path.write_text(json.dumps(result))
    print(views, seed, result, flush=True)


def learning_table(out: str, seeds: int) -> str:
    """AP and AP50 of all runs, as Markdown."""
    lines = ['| views | AP | AP50 | AP, apart from fresh, in its standard deviations |']
    lines.append('|---|--:|--:|--:|')
    found = {
        views: [json.loads(result_path(out, views, seed).read_text()) for seed in range(seeds)]
        for views in (FRESH, *VIEWS)
    }
    fresh = [result['ap'] for result in found[FRESH]]
    deviation = statistics.stdev(fresh)
    for views, results in found.items():
        cells = []
        for metric in ('ap', 'ap50'):
            values = [result[metric] for result in results]
            cells.append(spread(values))
        apart = (statistics.mean(r['ap'] for r in results) - statistics.mean(fresh)) / deviation
        name = str(views) if views else 'fresh augmentation'
        lines.append(f'| {name} | {" | ".join(cells)} | {apart:+.1f} |')
    return '\n'.join(lines)


def step_table(image: tuple[int, int], batch: int, rounds: int, clock: Callable[[], float]) -> str:
    """Seconds of a step with features computed and read, as Markdown."""
    import contenders as cs
    import torch
    from mmengine.registry import init_default_scope

    from mmdet_gdino_lora.engine.replay import KEPT_VIEW
    from mmdet_gdino_lora.frozen.encode import FrozenFeatures
    from mmdet_gdino_lora.frozen.store import Entry, read
    from mmdet_gdino_lora.frozen.views import MISSING

    init_default_scope('mmdet')
    with tempfile.TemporaryDirectory() as folder:
        scale = cs.Scale(image=image, batch=batch)
        contender = cs.ours(cs.text_model(folder), scale, 'decoder')
        entries = [Entry(f'{folder}/{number}', '') for number in range(batch)]
        features = FrozenFeatures(torch.bfloat16)

        def step(reads: bool) -> float:
            inputs = contender.data(scale.batch_of(0))
            begin = clock()
            for sample, entry in zip(inputs['data_samples'], entries):
                kept = read(entry) if reads else None
                if kept:
                    sample.set_field(kept[0], KEPT_VIEW)
                elif reads:
                    sample.set_metainfo({MISSING: entry})
            contender.model.frozen_features = features if reads else None
            contender.loss(inputs).backward()
            torch.nn.utils.clip_grad_norm_(contender.trained, 0.1)
            contender.optimizer.step()
            contender.optimizer.zero_grad()
            return clock() - begin

        for reads in (False, True):
            step(reads)
        features.settle()
        spent: dict[str, list[float]] = {'computed': [], 'read': []}
        for _ in range(rounds):
            for name, seconds in spent.items():
                seconds.append(step(name == 'read'))
    return table('step', spent)


def time_table(out: Path, rounds: int, clock: Callable[[], float]) -> str:
    """Seconds of an epoch with features computed and read, as Markdown."""
    from mmengine.hooks import Hook

    class Watch(Hook):
        """Seconds of every epoch."""

        def __init__(self) -> None:
            self.seconds: list[float] = []

        def before_train_epoch(self, runner) -> None:
            self._begin = clock()

        def after_train_epoch(self, runner) -> None:
            self.seconds.append(clock() - self._begin)

    out.mkdir(parents=True, exist_ok=True)
    root = drawn(out, 'of_time')
    spent: dict[str, list[float]] = {'computed': [], 'first': [], 'read': []}
    with tempfile.TemporaryDirectory(dir=out) as folder:
        for turn in range(rounds + 1):
            for views in (FRESH, 1):
                epochs, features = 2 if turn else 1, Path(folder, 'features')
                cfg = settings(root, Path(folder), views, 0, epochs, TIMED, features)
                for key in ('val_dataloader', 'val_evaluator', 'val_cfg'):
                    cfg.pop(key)
                runner, watch = build_runner(cfg), Watch()
                runner.register_hook(watch)
                runner.train()
                if turn:
                    spent['read' if views else 'computed'] += watch.seconds
                elif views:
                    spent['first'] += watch.seconds
    return table('epoch', spent)


def table(what: str, spent: dict[str, list[float]]) -> str:
    """Medians, and their ratios to the first."""
    computed = statistics.median(spent['computed'])
    lines = [f'| features | seconds of {what} | of computed |', '|---|--:|--:|']
    for name, seconds in spent.items():
        middle = statistics.median(seconds)
        lines.append(f'| {name} | {middle:.2f} | {middle / computed:.2f} |')
    return '\n'.join(lines)


if __name__ == '__main__':
    run(main)

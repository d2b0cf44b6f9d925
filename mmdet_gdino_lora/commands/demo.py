"""`make demo`: a Grounding DINO learns classes whose words its base never saw, by LoRA adapters.

Draws the shapes data set, measures the shipped base on its own classes and on the new ones, trains
adapters from configs/gdino_lora_shapes.py with mmengine's runner, measures again, draws a picture.
The images that are measured on are those of the test splits, which no setting was chosen on.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import io
import logging
import os
import resource
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Optional

from mmdet_gdino_lora.commands.common import build_runner, read_arguments, read_config

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.evaluator import Evaluator
    from mmengine.runner import Runner

WORK_DIR = 'work_dirs/demo'
#: Images of each split with --quick.
QUICK = 8
START = time.time()


def main(argv: Optional[Sequence[str]] = None) -> None:
    """The demo, from data to table.

    Args:
        argv: Arguments; None: the process's own.
    """
    arguments = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    arguments.add_argument(
        '--quick',
        action='store_true',
        help='a few images and iterations: whether everything runs; the numbers say nothing then',
    )
    args = read_arguments(arguments, argv)
    say('starting')
    cfg = read_config('gdino_lora_shapes', work_dir=WORK_DIR)

    from mmdet_gdino_lora.datasets.shapes import BASE_CLASSES, NEW_CLASSES, SPLITS, write_shapes
    from mmdet_gdino_lora.engine.preflight import check_config

    say('data: coloured shapes on cluttered backgrounds, drawn here')
    splits = {k: v for k, v in SPLITS.items() if k != 'base_train'}
    if args.quick:
        splits = {name: dataclasses.replace(split, images=QUICK) for name, split in splits.items()}
        cfg.train_cfg.max_epochs = 1
    write_shapes(cfg.data_root, splits=splits)
    check_config(cfg)
    # Both sets are measured here, in place of the runner's validation on one of them.
    validation = {key: cfg.pop(key) for key in ('val_dataloader', 'val_evaluator', 'val_cfg')}
    runner = build_quietly(cfg)
    sets = {
        'new': load_set(validation, cfg.data_root, 'new_test', NEW_CLASSES),
        'base': load_set(validation, cfg.data_root, 'base_test', BASE_CLASSES),
    }
    say('the base as it is shipped')
    before = {name: measure(runner.model, name, *data) for name, data in sets.items()}
    say('training its adapters')
    runner.train()
    say('the base with its adapters')
    after = {name: measure(runner.model, name, *data) for name, data in sets.items()}
    picture = os.path.join(WORK_DIR, 'predictions.png')
    draw(runner.model, sets['new'][0], picture)
    report(runner.model, before, after, picture)


def say(text: str) -> None:
    """Prints a step with the seconds since the start.

    Args:
        text: What happens next.
    """
    print(f'[{time.time() - START:4.0f} s] {text}', flush=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps off the screen what mmengine and pycocotools say while they set up."""
    from mmengine.logging import MMLogger

    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def build_quietly(cfg: Config) -> Runner:
    """Builds the runner without its page of settings; what it says later is shown.

    Args:
        cfg: Config of the run.

    Returns:
        mmengine's runner.
    """
    cfg.log_level = 'WARNING'
    runner = build_runner(cfg)
    runner.logger.setLevel(logging.INFO)
    for handler in runner.logger.handlers:
        handler.setLevel(logging.INFO)
    return runner


def load_set(cfg: dict, root: str, split: str, classes: tuple[str, ...]) -> tuple:
    """The config's validation data and metric, for a split of the shapes.

    Args:
        cfg: With ``val_dataloader`` and ``val_evaluator``.
        root: Folder of the data set.
        split: Name of the split.
        classes: Its classes.

    Returns:
        Data loader, and mmengine's evaluator.
    """
    from mmengine.evaluator import Evaluator
    from mmengine.runner import Runner

    annotations = f'annotations/{split}.json'
    loader = copy.deepcopy(cfg['val_dataloader'])
    loader.dataset.update(
        metainfo=dict(classes=classes), ann_file=annotations, data_prefix=dict(img=f'{split}/')
    )
    with quiet():
        data = Runner.build_dataloader(loader)
        evaluator = Evaluator({**cfg['val_evaluator'], 'ann_file': root + annotations})
    evaluator.dataset_meta = data.dataset.metainfo
    return data, evaluator


def measure(model: Any, name: str, loader: Any, evaluator: Evaluator) -> float:
    """AP50 of a model.

    Args:
        model: The detector.
        name: Of the classes, for the screen.
        loader: Data loader.
        evaluator: With a ``CocoMetric``.

    Returns:
        AP at IoU 0.5, in 0..1.
    """
    print(f'         {name} classes ', end='', flush=True)
    result = evaluate(model, loader, evaluator)['coco/bbox_mAP_50']
    print(f' AP50 {result:.3f}', flush=True)
    return result


def evaluate(model: Any, loader: Any, evaluator: Evaluator) -> dict[str, float]:
    """Metrics of a model, with a dot for every batch.

    Args:
        model: The detector.
        loader: Data loader.
        evaluator: mmengine's.

    Returns:
        The evaluator's metrics.
    """
    import torch

    model.eval()
    for batch in loader:
        with torch.no_grad():
            evaluator.process(model.test_step(batch), batch)
        print('.', end='', flush=True)
    with quiet():
        return evaluator.evaluate(len(loader.dataset))


def draw(model: Any, loader: Any, path: str, images: int = 6, zoom: int = 3) -> None:
    """Draws the first images twice, with the truth on the left and predictions on the right.

    Args:
        model: The detector.
        loader: Data loader.
        path: Picture to write.
        images: Number of images, two in each row.
        zoom: Scale.
    """
    import cv2
    import mmcv
    import numpy as np
    import torch

    from mmdet_gdino_lora.commands.drawing import draw_boxes

    names = loader.dataset.metainfo['classes']
    batch = next(iter(loader))
    with torch.no_grad():
        samples = model.test_step(batch)[:images]
    pairs = []
    for sample in samples:
        image = mmcv.imread(sample.img_path)
        image = cv2.resize(image, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        found = sample.pred_instances[sample.pred_instances.scores > 0.3].numpy()
        truth = sample.gt_instances.numpy()
        predicted = [f'{names[i]} {score:.2f}' for i, score in zip(found.labels, found.scores)]
        pair = [
            draw_boxes(image, truth.bboxes * zoom, truth.labels, [names[i] for i in truth.labels]),
            draw_boxes(image, found.bboxes * zoom, found.labels, predicted),
        ]
        pairs.append(np.hstack([cv2.copyMakeBorder(p, 3, 3, 3, 3, 0) for p in pair]))
    cv2.imwrite(path, np.vstack([np.hstack(pairs[i : i + 2]) for i in range(0, images, 2)]))


def report(model: Any, before: dict[str, float], after: dict[str, float], picture: str) -> None:
    """Prints the table.

    Args:
        model: The detector.
        before: AP50 of each set before training.
        after: The same after it.
        picture: Path of the picture.
    """
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
    say('done')
    print('\nAP50           before   after')
    for name, text in dict(new='new classes', base='base classes').items():
        print(f'{text:12s}   {before[name]:6.3f}  {after[name]:6.3f}')
    print(f'\nparameters   {trained:,} trained of {total:,} ({trained / total:.1%})')
    print(f'peak memory  {memory:.2f} GB')
    print(f'picture      {picture}  (left truth, right predictions)')
    print(f'checkpoint   {WORK_DIR}')

"""One run of recipe.py: its images, its config, its training and its tests."""

from __future__ import annotations

import contextlib
import io
import json
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook

from mmdet_gdino_lora.commands.common import build_runner, read_config
from mmdet_gdino_lora.formats.config import Plan, config_text
from mmdet_gdino_lora.formats.photos import Labelled, Photo
from mmdet_gdino_lora.formats.recognise import read_photos
from mmdet_gdino_lora.formats.split import take_off
from mmdet_gdino_lora.formats.written import as_coco, categories_of
from mmdet_gdino_lora.lora.tensors import ADAPTER

STRENGTHS = (0.5, 0.75, 1.0)
TESTED = 64


class Best(Hook):
    """Keeps the trained weights of the best validation, in memory."""

    def __init__(self) -> None:
        self.ap, self.iteration = -1.0, 0
        self.weights: dict[str, torch.Tensor] = {}

    def after_val_epoch(self, runner: Any, metrics: Any = None) -> None:
        """Looks at the metric."""
        if runner.iter and metrics['coco/bbox_mAP'] > self.ap:
            self.ap, self.iteration = metrics['coco/bbox_mAP'], runner.iter
            self.weights = {
                name: parameter.detach().clone()
                for name, parameter in runner.model.named_parameters()
                if parameter.requires_grad
            }


class First(Hook):
    """Trains the text tower, neck and heads alone at first, and then everything.

    Args:
        share: Of the iterations that are the first.
    """

    PARTS = ('language_model', 'text_feat_map', 'bbox_head', 'neck', 'memory_trans')

    def __init__(self, share: float) -> None:
        self.share = share
        self.later: list[torch.nn.Parameter] = []

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Freezes in the first iteration, and frees when it is time."""
        if runner.iter == 0:
            self.later = [
                parameter
                for name, parameter in runner.model.named_parameters()
                if parameter.requires_grad and not name.startswith(self.PARTS)
            ]
        if runner.iter in (0, int(self.share * runner.max_iters)):
            for parameter in self.later:
                parameter.requires_grad_(runner.iter > 0)


def measure(cell: Any, changes: dict[str, Any], path: Path, pixels: int) -> dict[str, Any]:
    """Trains and tests.

    Args:
        cell: Which run; of recipe.py.
        changes: What the contender changes.
        path: Where its figures will lie; its files lie beside it.
        pixels: The images' longer side.

    Returns:
        The figures.
    """
    torch.set_num_threads(1)
    cfg = config_of(cell, dict(changes), path, pixels)
    first = cfg.pop('first', None)
    with quiet():
        runner = build_runner(cfg)
    best = Best()
    runner.register_hook(best, 'LOWEST')
    if first:
        runner.register_hook(First(first), 'HIGHEST')
    begin = time.time()
    with quiet():
        runner.train()
    seconds = time.time() - begin

    detector = runner.model
    result: dict[str, Any] = dict(seconds=seconds, iterations=runner.iter, best=best.iteration)
    result['last'] = figures(runner.test_loop)
    strengths = {}
    for strength in STRENGTHS:
        detector.set_adapter({ADAPTER: strength})
        strengths[strength] = figures(runner.val_loop)['ap']
    result['strength'] = max(strengths, key=lambda s: (strengths[s], s))
    detector.set_adapter({ADAPTER: result['strength']})
    result['with strength'] = figures(runner.test_loop)
    detector.set_adapter(ADAPTER)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if name in best.weights:
                parameter.copy_(best.weights[name])
    result['at best'] = figures(runner.test_loop)
    return result


def figures(loop: Any) -> dict[str, float]:
    """AP and AP50 on the images of a loop."""
    with quiet():
        found = loop.run()
    return dict(ap=found['coco/bbox_mAP'], ap50=found['coco/bbox_mAP_50'])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without pycocotools' prints."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def config_of(cell: Any, changes: dict[str, Any], path: Path, pixels: int) -> Any:
    """The config that new-config writes for the cell's images, with the contender's changes."""
    labelled = read_photos(str(shapes(path.parent) if cell.photos == 'shapes' else cell.photos))
    splits = drawn(labelled, cell.shots, cell.seed)
    folder = path.with_suffix('').resolve()
    folder.mkdir(parents=True, exist_ok=True)
    categories = categories_of(labelled.names, labelled.ids)
    for name, photos in splits.items():
        content = as_coco(labelled, photos, categories)
        (folder / f'{name}.json').write_text(json.dumps(content))
    images = len(splits['train'])
    text = config_text(
        Plan(
            base='gdino_lora_shapes',
            made_from=str(cell),
            photos={name: labelled.root.as_posix() for name in splits},
            folder=folder.name,
            classes=labelled.names,
            prompts={},
            samples=False,
            retained=None,
            checkpoint=None,
            images=images,
            measured=len(splits['val']),
            many=False,
        )
    )
    written = folder.with_suffix('.py')
    written.write_text(text)
    special = {
        key: changes.pop(key)
        for key in ('steps', 'most_epochs', 'augment', 'plateau', 'first')
        if key in changes
    }
    options = {'randomness.seed': cell.seed, **changes}
    cfg = read_config(str(written), options, str(folder))
    cfg.log_level = 'WARNING'
    cfg.custom_hooks = []
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=-1, save_last=False)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        for step in loader.dataset.pipeline:
            if step['type'] == 'Resize':
                step['scale'] = (pixels, pixels)
    if 'steps' in special:
        schedule(cfg, images, **special)
    if 'augment' in special:
        augment(cfg.train_dataloader.dataset, special['augment'], pixels)
    cfg.first = special.get('first')
    return cfg


def schedule(
    cfg: Any, images: int, steps: int, most_epochs: int, plateau: bool = False, **_
) -> None:
    """Epochs that make a number of iterations, and the learning rate over them."""
    epochs = max(4, round(steps / -(-images // cfg.train_dataloader.batch_size)))
    epochs = min(most_epochs, epochs)
    cfg.train_cfg.update(max_epochs=epochs, val_interval=max(1, epochs // 5))
    cfg.param_scheduler[1].end = epochs
    if plateau:
        milestones = [max(1, round(0.8 * epochs))]
        cfg.param_scheduler[1] = dict(
            type='MultiStepLR', by_epoch=True, begin=0, end=epochs, milestones=milestones, gamma=0.1
        )


def augment(dataset: Any, kind: str, pixels: int) -> None:
    """mmdet's augmentation for DETRs at the images' size.

    Args:
        dataset: Whose pipeline is changed.
        kind: ``'scales'``, ``'crops'`` (as well), or ``'colours'`` (too, as its YOLOs have them).
        pixels: The images' longer side.
    """
    scales = [(round(s * pixels), round(s * pixels)) for s in (0.75, 0.875, 1.0, 1.125, 1.25)]
    resize = dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)
    crop = dict(
        type='RandomCrop',
        crop_type='absolute_range',
        crop_size=(round(0.56 * pixels), round(0.88 * pixels)),
        allow_negative_crop=True,
    )
    ways = [[resize]] if kind == 'scales' else [[resize], [resize, crop, resize]]
    chosen = dict(type='RandomChoice', transforms=ways)
    colours = [dict(type='PhotoMetricDistortion')] if kind == 'colours' else []
    pipeline = list(dataset.pipeline)
    place = next(i for i, step in enumerate(pipeline) if step['type'] == 'Resize')
    dataset.pipeline = [*pipeline[:place], *colours, chosen, *pipeline[place + 1 :]]


def drawn(labelled: Labelled, shots: int, seed: int) -> dict[str, list[Photo]]:
    """Photos to train from, to validate on and to test on.

    Args:
        labelled: All there are.
        shots: Images of each class to train from; 0: all.
        seed: Of chance.

    Returns:
        By split. What is tested on is the same for every seed.
    """
    pool, test = labelled.split('train'), labelled.split('test')
    if not test:
        test = take_off(pool, 0)
        taken = {photo.path for photo in test}
        pool = [photo for photo in pool if photo.path not in taken]
    pool = [photo for photo in pool if photo.boxes]
    if shots:
        order = sorted(pool, key=lambda photo: str(photo.path))
        random.Random(seed).shuffle(order)
        train = chosen(order, labelled.names, shots)
        rest = [photo for photo in order if photo not in train]
        val = chosen(rest, labelled.names, max(1, shots // 4))
    else:
        val = take_off(pool, seed)
        kept = {photo.path for photo in val}
        train = [photo for photo in pool if photo.path not in kept]
    test = random.Random(0).sample(test, min(TESTED, len(test)))
    return dict(train=train, val=val, test=test)


def chosen(order: Sequence[Photo], names: Sequence[str], shots: int) -> list[Photo]:
    """The first photos with which every class is in as many, the rarest class first."""
    count = Counter(name for photo in order for name in {box.name for box in photo.boxes})
    result: list[Photo] = []
    for name in sorted(names, key=lambda name: count[name]):
        has = sum(any(box.name == name for box in photo.boxes) for photo in result)
        more = [p for p in order if p not in result and any(b.name == name for b in p.boxes)]
        result += more[: max(0, shots - has)]
    return result


def shapes(out: Path) -> Path:
    """The demo's new classes as a folder of photos, drawn where it isn't there."""
    from mmdet_gdino_lora.datasets.shapes import SPLITS, write_shapes

    return Path(write_shapes(out / 'shapes', splits={k: SPLITS[k] for k in USED}))


USED = ('new_train', 'new_test')

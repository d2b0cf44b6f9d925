"""Detects what the texts name in one image and draws the boxes.

image_demo.py CONFIG CHECKPOINT IMAGE --texts "red star . dog"
image_demo.py CONFIG CHECKPOINT IMAGE --texts "red star . dog" --adapter default=0.5 other/=0.5
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Optional

from mmdet_gdino_lora.commands.common import config_file, load_source, read_arguments, read_source
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.shipped import typed_config

if TYPE_CHECKING:
    from mmcv.transforms import Compose
    from mmengine.config import Config
    from mmengine.structures import InstanceData


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    args = read_arguments(own_parser(), argv)

    import cv2

    from mmdet_gdino_lora.checks.findings import tell
    from mmdet_gdino_lora.checks.names import check_texts
    from mmdet_gdino_lora.commands.drawing import draw_boxes
    from mmdet_gdino_lora.commands.thresholds import lowest_scores
    from mmdet_gdino_lora.text import split_names

    names = split_names(args.texts)
    if not names:
        raise ConfigError(f'--texts {args.texts!r} names nothing; write "red star . dog"')
    tell(check_texts('--texts', args.texts, names))
    config = typed_config(args.config)
    for what, path in dict(config=config, image=args.image).items():
        if not os.path.isfile(path):
            raise ConfigError(f'{what} {path!r}: no such file')
    image = cv2.imread(args.image)
    if image is None:
        raise ConfigError(f'image {args.image!r} is not an image that OpenCV can read')

    least = lowest_scores(args.thresholds, names, args.score_thr)
    detector, pipeline = load(config_file(config), args.checkpoint, args.device)
    if args.adapter:
        switch(detector, args.adapter)
    found = detect(detector, pipeline, args.image, names)
    found = found[found.scores >= found.scores.new_tensor(least)[found.labels]]
    boxes = found.bboxes.cpu().numpy()
    scores = found.scores.tolist()
    labels = found.labels.tolist()
    for box, score, label in zip(boxes.tolist(), scores, labels):
        corners = ', '.join(f'{value:.1f}' for value in box)
        print(f'{names[label]}  {score:.2f}  [{corners}]')
    if not scores:
        print(f'nothing with a score of at least {args.score_thr}')
    out = args.out or os.path.join('outputs', os.path.basename(args.image))
    os.makedirs(os.path.dirname(out) or '.', exist_ok=True)
    captions = [f'{names[label]} {score:.2f}' for label, score in zip(labels, scores)]
    if not cv2.imwrite(out, draw_boxes(image, boxes, labels, captions)):
        raise ConfigError(f'--out {out!r}: OpenCV can not write there; name a .jpg or .png file')
    print(f'picture: {out}')


def own_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(description='Detect what the texts name in an image')
    arguments.add_argument('config', help='config file')
    arguments.add_argument(
        'checkpoint', help='checkpoint file, of adapters or of a whole model, or adapter folder'
    )
    arguments.add_argument('image', help='image file')
    arguments.add_argument('--texts', required=True, help='names, separated by " . "')
    arguments.add_argument('--out', help='picture to write; default: outputs/<name of the image>')
    arguments.add_argument('--score-thr', type=float, default=0.3, help='lowest score shown')
    arguments.add_argument(
        '--thresholds', help="a report's thresholds.json: the lowest score of each class in it"
    )
    arguments.add_argument('--device', help='default: cuda where there is one, else cpu')
    arguments.add_argument(
        '--adapter',
        nargs='+',
        metavar='ADAPTER[=WEIGHT]',
        help="what is switched on: 'default' (CHECKPOINT's adapter), folders or checkpoints of "
        "other adapters of the same base, several with weights; or 'none' (the base)",
    )
    return arguments


def load(
    cfg: Config, checkpoint: Optional[str], device: Optional[str] = None
) -> tuple[Any, Compose]:
    """Builds the detector of a config, with a checkpoint, and the config's test pipeline.

    Args:
        cfg: An mmengine ``Config``.
        checkpoint: Checkpoint file, or folder of an adapter; None: the base that training would
            begin with, adapters off.
        device: Such as ``cuda:0``; by default a GPU where there is one.

    Returns:
        The detector in eval mode, and the pipeline without the loading of annotations.

    Raises:
        ConfigError: A file is missing or does not fit.
    """
    import torch
    from mmcv.transforms import Compose
    from mmdet.registry import MODELS
    from mmdet.utils import register_all_modules
    from mmengine.runner import load_checkpoint

    is_ours = cfg.model.type == 'LoRAGroundingDINO'
    if checkpoint is None and not is_ours:
        checkpoint = cfg.get('load_from')
    if checkpoint is None and not (cfg.model.get('base_checkpoint') or cfg.get('load_from')):
        raise ConfigError(
            'neither model.base_checkpoint nor load_from is set: the base would be random weights, '
            'which detect nothing; set one of them, or name a CHECKPOINT'
        )
    if checkpoint and '://' not in checkpoint and not os.path.exists(checkpoint):
        raise ConfigError(f'checkpoint {checkpoint!r}: no such file')
    if checkpoint and os.path.isdir(checkpoint):
        read_source(checkpoint)
    register_all_modules()
    if is_ours and cfg.get('load_from'):
        cfg.model.setdefault('base_checkpoint', cfg.load_from)
    detector = MODELS.build(cfg.model)
    if checkpoint is None:
        if cfg.model.get('lora'):
            detector.set_adapter(None)
    elif os.path.isdir(checkpoint):
        load_source(detector, checkpoint, None)
    else:
        load_checkpoint(detector, checkpoint, map_location='cpu')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    pipeline = Compose([step for step in dataset.pipeline if 'LoadAnn' not in step['type']])
    device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
    return detector.to(device).eval(), pipeline


def switch(detector: Any, adapters: list[str]) -> None:
    """Switches adapters on, and those that aren't named off.

    Args:
        detector: With its own adapter loaded.
        adapters: As on the command line.

    Raises:
        ConfigError: The detector has no adapters, or one doesn't fit it.
    """

    if not hasattr(detector, 'set_adapter'):
        raise ConfigError('--adapter: the config sets no model.lora, so there is nothing to switch')
    weights: dict[str, float] = {}
    for number, adapter in enumerate(adapters):
        source, _, weight = adapter.rpartition('=') if '=' in adapter else (adapter, '', '1')
        try:
            strength = float(weight)
        except ValueError:
            raise ConfigError(
                f'--adapter {adapter!r}: {weight!r} is no number; write default=0.5'
            ) from None
        if source in ('default', 'none'):
            weights[source] = weights.get(source, 0.0) + strength
        elif os.path.exists(source):
            weights[f'adapter{number}'] = strength
            detector.load_adapter(source, f'adapter{number}')
        else:
            raise ConfigError(
                f"--adapter {source!r}: neither 'default', 'none' nor a file or folder that is "
                'there'
            )
    if 'none' in weights and len(weights) > 1:
        raise ConfigError('--adapter none is the base alone; leave the others out')
    detector.set_adapter(None if 'none' in weights else weights)


def detect(detector: Any, pipeline: Compose, image: str, names: list[str]) -> InstanceData:
    """Detects the named classes in one image.

    Args:
        detector: In eval mode.
        pipeline: See :func:`load`.
        image: Image file.
        names: Class names.

    Returns:
        mmengine's ``InstanceData`` with ``bboxes`` (absolute xyxy), ``scores`` and ``labels``.
    """
    import torch

    sample = pipeline(dict(img_path=image, img_id=0, text=tuple(names), custom_entities=True))
    batch = dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']])
    with torch.no_grad():
        return detector.test_step(batch)[0].pred_instances

"""Labels a folder of photos with a tuned detector, or adds what a labelled set lacks.

label.py CONFIG CHECKPOINT PHOTOS -o OUT.json
label.py CONFIG CHECKPOINT PHOTOS -o OUT.json --threshold 0.3 --threshold "wheel bolt=0.45"
label.py CONFIG CHECKPOINT PHOTOS -o OUT.json --complete TRAIN.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

from mmdet_gdino_lora.commands.common import (
    add_cfg_options,
    add_overwrite,
    read_arguments,
    read_config,
    refuse_overwriting,
)
from mmdet_gdino_lora.errors import ConfigError

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmdet_gdino_lora.checks.coco_file import CocoFile
    from mmdet_gdino_lora.labelling.detections import Found
    from mmdet_gdino_lora.labelling.kept import Kept
    from mmdet_gdino_lora.labelling.photos import Photo

#: Formats, and how their files end.
FORMATS = {'coco': '.json', 'label-studio': '.json', 'cvat': '.xml'}
#: Score from which on detections are kept while photos are gone through: more than are written, so
#: that other thresholds ask for no second detection.
KEPT_FROM = 0.05


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    args = read_arguments(own_parser(), argv)

    from mmdet_gdino_lora.checks.walk import datasets_of
    from mmdet_gdino_lora.commands.thresholds import chosen_scores
    from mmdet_gdino_lora.engine.preflight import config_classes
    from mmdet_gdino_lora.labelling.coco import read_labelled
    from mmdet_gdino_lora.labelling.photos import find_photos, photos_of
    from mmdet_gdino_lora.labelling.thresholds import read_thresholds

    cfg = read_config(args.config, args.cfg_options)
    key, dataset = next(datasets_of('test_dataloader', cfg.get('test_dataloader')), ('', {}))
    if not dataset:
        raise ConfigError(
            f'config {args.config!r} has no test_dataloader, which names the classes and says how '
            'an image is read; add one, as the shipped configs have it'
        )
    names = list(config_classes(key, dataset))
    given = read_thresholds(args.threshold, names)
    if args.thresholds:
        chosen = chosen_scores(args.thresholds, names)
        given = [own if own is not None else score for own, score in zip(given, chosen)]
    check_arguments(args)
    coco = read_labelled(args.complete, names) if args.complete else None
    if coco is None:
        photos = find_photos(args.photos, pictures_of(args))
    else:
        photos = photos_of(args.photos, (image['file_name'] for image in coco.images))
    found, kept = detect(args, cfg, dataset, names, given, photos)
    report_unreadable(args.photos, found)
    write(args, names, given, found, coco)
    kept.remove()


def detect(
    args: argparse.Namespace,
    cfg: Config,
    dataset: Mapping[str, Any],
    names: Sequence[str],
    given: Sequence[Optional[float]],
    photos: Sequence[Photo],
) -> tuple[dict[str, Found], Kept]:
    """Detects the classes in all photos, but for those in which an earlier start did.

    Args:
        args: Of the command line.
        cfg: The config.
        dataset: Of its test set.
        names: Class names.
        given: Their thresholds, None where none was given.
        photos: To go through.

    Returns:
        What was found in each photo, and the file that it is kept in.
    """
    from mmdet_gdino_lora.commands.image_demo import load
    from mmdet_gdino_lora.labelling.going import go_through
    from mmdet_gdino_lora.labelling.kept import Kept, digest, fingerprint

    lowest = min([KEPT_FROM, *(threshold for threshold in given if threshold is not None)])
    loader = cfg.test_dataloader
    size = args.batch_size or loader.get('batch_size', 1)
    settings = {
        'CHECKPOINT': fingerprint(args.checkpoint),
        'CONFIG': digest(cfg.model, cfg.get('load_from'), dataset.get('pipeline')),
        'class names': names,
        '--batch-size': size,
        'a --threshold below 0.05': lowest,
    }
    asked = [*args.threshold, *filter(None, [args.thresholds])]
    kept = Kept(begun_by(args), settings, asked, args.overwrite)
    if kept.known:
        print(f'goes on from {kept.path}')
    if kept.thresholds != asked:
        print(f'--threshold was {kept.thresholds} then: what was detected serves the new ones, too')
    detector, pipeline = load(cfg, args.checkpoint, args.device)
    workers = loader.get('num_workers', 0)
    found = go_through(detector, pipeline, args.photos, photos, names, kept, size, workers, lowest)
    return found, kept


def own_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(description='Label photos with a tuned detector')
    arguments.add_argument('config', help='config file; its classes are looked for')
    arguments.add_argument(
        'checkpoint', help='checkpoint file, of adapters or of a whole model, or adapter folder'
    )
    arguments.add_argument('photos', help='folder of photos; folders in it are looked into')
    arguments.add_argument('-o', '--out', required=True, help='file to write')
    arguments.add_argument(
        '--threshold',
        action='append',
        default=[],
        metavar='[CLASS=]SCORE',
        help='lowest score of a label, of all classes or of one; default: 0.3, or with --complete '
        'what is right as often as --right says',
    )
    arguments.add_argument(
        '--thresholds',
        metavar='FILE',
        help="a report's thresholds.json, for classes of which --threshold says nothing",
    )
    arguments.add_argument('--format', choices=FORMATS, default='coco', help='default: coco')
    arguments.add_argument(
        '--complete', metavar='TRAIN.json', help='add boxes that this COCO file of PHOTOS lacks'
    )
    arguments.add_argument(
        '--overlap',
        type=float,
        default=0.3,
        help='with --complete: IoU with a label from which on no box is added; default: 0.3',
    )
    arguments.add_argument(
        '--right',
        type=float,
        default=0.95,
        metavar='SHARE',
        help='with --complete: share of the added boxes that shall be right; default: 0.95',
    )
    arguments.add_argument(
        '--uncertain',
        type=int,
        default=0,
        metavar='N',
        help='draw the N photos with a score nearest to its threshold, into OUT_uncertain/',
    )
    arguments.add_argument('--batch-size', type=int, help="default: the config's test_dataloader's")
    arguments.add_argument('--device', help='default: cuda where there is one, else cpu')
    add_overwrite(arguments)
    add_cfg_options(arguments)
    return arguments


def check_arguments(args: argparse.Namespace) -> None:
    """Finds mistakes before anything is built.

    Args:
        args: Of the command line.

    Raises:
        ConfigError: There is one.
    """
    ending = FORMATS[args.format]
    if not args.out.endswith(ending):
        raise ConfigError(f'-o {args.out!r}: --format {args.format} is a {ending} file; name it so')
    if not os.path.isdir(args.photos):
        raise ConfigError(f'PHOTOS {args.photos!r}: no such folder; name the folder of the photos')
    if '://' in args.checkpoint or not os.path.exists(args.checkpoint):
        raise ConfigError(
            f'CHECKPOINT {args.checkpoint!r}: no such file or folder; name one that training wrote'
        )
    if args.complete and os.path.abspath(args.complete) == os.path.abspath(args.out):
        raise ConfigError(
            f'-o {args.out!r} is the file that is to be completed, which is never changed; name '
            'another'
        )
    if not 0 < args.overlap <= 1:
        raise ConfigError(f'--overlap {args.overlap}: give a number above 0, and at most 1')
    if not 0 < args.right < 1:
        raise ConfigError(f'--right {args.right}: give a share between 0 and 1, such as 0.8')
    if args.uncertain < 0 or (args.batch_size is not None and args.batch_size < 1):
        raise ConfigError(
            f'--uncertain {args.uncertain}, --batch-size {args.batch_size}: give numbers of photos'
        )
    others = [view_of(args)] if args.format == 'label-studio' else []
    others += [pictures_of(args)] if args.uncertain else []
    # A start that was killed at its end has written them already, and this one goes on from it.
    refuse_overwriting(
        '-o', [args.out, *([] if os.path.isfile(begun_by(args)) else others)], args.overwrite
    )


def begun_by(args: argparse.Namespace) -> str:
    """Where what was detected so far is kept."""
    return f'{args.out}.begun.jsonl'


def pictures_of(args: argparse.Namespace) -> str:
    """Folder of the least certain photos' pictures."""
    return os.path.splitext(args.out)[0] + '_uncertain'


def view_of(args: argparse.Namespace) -> str:
    """File of the labelling interface that Label Studio's tasks fit."""
    return os.path.splitext(args.out)[0] + '_view.xml'


def report_unreadable(folder: str, found: Mapping[str, Found]) -> None:
    """Warns of photos that can't be read.

    Args:
        folder: Of the photos.
        found: In each.

    Raises:
        ConfigError: None can be read.
    """
    from mmdet_gdino_lora.checks.findings import Finding, tell
    from mmdet_gdino_lora.checks.words import share

    for name, one in found.items():
        if one.unreadable:
            print(f'left out: {os.path.join(folder, name)} {one.unreadable}')
    count = sum(bool(one.unreadable) for one in found.values())
    if count:
        told = share(count, len(found), 'photos')
        nothing = count == len(found)
        tell([Finding(f'PHOTOS {folder!r}: {told} can not be read; put them right', nothing)])


def write(
    args: argparse.Namespace,
    names: Sequence[str],
    given: Sequence[Optional[float]],
    found: Mapping[str, Found],
    coco: Optional[CocoFile],
) -> None:
    """Writes what was found, and says how much it is. OUT comes last: when it is there, all is.

    Args:
        args: Of the command line.
        names: Class names.
        given: Their thresholds, None where none was given.
        found: In each photo.
        coco: The set that is to be completed, if any.
    """
    from mmdet_gdino_lora.engine.atomic import write_whole
    from mmdet_gdino_lora.labelling.coco import as_coco
    from mmdet_gdino_lora.labelling.completion import complete
    from mmdet_gdino_lora.labelling.formats import as_cvat, as_label_studio, label_studio_view
    from mmdet_gdino_lora.labelling.thresholds import USUAL

    if coco is None:
        thresholds = [USUAL if threshold is None else threshold for threshold in given]
        content = as_coco(found, names, thresholds)
        print(table(names, thresholds, content))
    else:
        with open(args.complete, encoding='utf-8') as file:
            before = dict(json.load(file), images=coco.images, annotations=coco.annotations)
        content, chosen = complete(before, found, names, given, args.overlap, args.right)
        print(table(names, chosen, content))
        thresholds = [1.0 if threshold is None else threshold for threshold in chosen]
    if args.uncertain:
        draw(args, names, thresholds, found)
    if args.format == 'label-studio':
        write_whole(view_of(args), label_studio_view(content))
        print(f'written: {view_of(args)}')
        text = json.dumps(as_label_studio(content))
    else:
        text = as_cvat(content) if args.format == 'cvat' else json.dumps(content)
    write_whole(args.out, text)
    print(f'written: {args.out}')


def table(
    names: Sequence[str], thresholds: Sequence[Optional[float]], content: Mapping[str, Any]
) -> str:
    """Says how many boxes there are of each class.

    Args:
        names: Class names.
        thresholds: Of each; None: no box of it is added.
        content: Of the COCO file.

    Returns:
        A line for each class.
    """
    categories = {category['name']: category['id'] for category in content['categories']}
    lines = []
    for name, threshold in zip(names, thresholds):
        boxes = [box for box in content['annotations'] if box['category_id'] == categories[name]]
        new = sum('score' in box for box in boxes)
        from_ = 'no threshold can be told' if threshold is None else f'score from {threshold:.3f}'
        lines.append(f'{name}: {new} new boxes, {len(boxes) - new} labelled before; {from_}')
    return '\n'.join(lines)


def draw(
    args: argparse.Namespace,
    names: Sequence[str],
    thresholds: Sequence[float],
    found: Mapping[str, Found],
) -> None:
    """Draws the least certain photos, those first that are nearest to a threshold.

    Args:
        args: Of the command line.
        names: Class names.
        thresholds: Of each class.
        found: In each photo.
    """
    import cv2
    import numpy as np

    from mmdet_gdino_lora.commands.drawing import draw_boxes
    from mmdet_gdino_lora.engine.atomic import write_whole
    from mmdet_gdino_lora.labelling.detections import least_certain

    folder = pictures_of(args)
    for old in os.listdir(folder) if os.path.isdir(folder) else ():
        if re.fullmatch(r'\d{4}_.*\.jpg', old):
            os.remove(os.path.join(folder, old))
    for number, name in enumerate(least_certain(found, thresholds, args.uncertain), 1):
        one = found[name]
        shown = one.above([threshold - 0.1 for threshold in thresholds])
        boxes = np.array([one.boxes[place] for place in shown]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [one.labels[place] for place in shown]
        scores = [one.scores[place] for place in shown]
        captions = [
            f'{names[label]} {score:.2f}{"" if score >= thresholds[label] else " (left out)"}'
            for label, score in zip(labels, scores)
        ]
        image = cv2.imread(os.path.join(args.photos, name))
        if image is None:  # it could be read when it was gone through
            continue
        flat = re.sub(r'[\\/]', '_', os.path.splitext(name)[0])
        _, picture = cv2.imencode('.jpg', draw_boxes(image, boxes, labels, captions))
        write_whole(os.path.join(folder, f'{number:04d}_{flat}.jpg'), picture.tobytes())
    print(f'written: {folder}/, the least certain first')

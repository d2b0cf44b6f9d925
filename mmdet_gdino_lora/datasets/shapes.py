"""The demo's data: coloured shapes on cluttered backgrounds, drawn here, in COCO's format.

Classes are two words that share tokens with other classes ("red circle", "blue circle", "blue
square"), so that a detector has to ground both words. The base classes are what the shipped base
was trained on; the new classes are made of colours and shapes whose words it never saw.

``python -m mmdet_gdino_lora.datasets.shapes [ROOT]`` writes what configs/gdino_*_shapes.py read::

    ROOT/annotations/{base_train,base_val,new_train,new_val}.json
    ROOT/{base_train,base_val,new_train,new_val}/000000.jpg ...

Every image depends on the seed, its split and its number alone. A split is written to one side and
put in place when it is whole, and drawn again only when it is missing, damaged or drawn otherwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Union

import cv2
import numpy as np

BASE_COLOURS = ('red', 'green', 'blue', 'yellow')
BASE_SHAPES = ('circle', 'square', 'triangle')
NEW_COLOURS = ('purple', 'orange', 'cyan')
NEW_SHAPES = ('star', 'bar', 'heart')
BASE_CLASSES = tuple(f'{colour} {shape}' for shape in BASE_SHAPES for colour in BASE_COLOURS)
NEW_CLASSES = tuple(f'{colour} {shape}' for shape in NEW_SHAPES for colour in NEW_COLOURS)

IMAGE_SIZE = 128
#: OpenCV's hue (0..179), saturation and value (0..255) of each colour word, before jitter.
HSV = {
    'red': (0, 220, 215),
    'orange': (14, 235, 240),
    'yellow': (29, 225, 240),
    'green': (60, 205, 185),
    'blue': (113, 215, 215),
    'purple': (143, 190, 190),
    'cyan': (88, 215, 225),
}


@dataclass(frozen=True)
class Split:
    """What one annotation file holds.

    Attributes:
        classes: Class names, in the order of COCO's category ids (from 1).
        images: Number of images.
    """

    classes: tuple[str, ...]
    images: int


SPLITS: Mapping[str, Split] = {
    'base_train': Split(BASE_CLASSES, 2000),
    'base_val': Split(BASE_CLASSES, 100),
    'base_test': Split(BASE_CLASSES, 200),
    'new_train': Split(NEW_CLASSES, 400),
    'new_val': Split(NEW_CLASSES, 100),
    'new_test': Split(NEW_CLASSES, 200),
}


def outline(shape: str) -> np.ndarray:
    """A shape's outline around the origin.

    Args:
        shape: One of ``BASE_SHAPES`` or ``NEW_SHAPES``.

    Returns:
        Corners [N, 2] as (x, y), y down, about the unit circle's size.
    """
    if shape in ('circle', 'heart'):
        turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
        if shape == 'circle':
            return np.stack([np.cos(turn), np.sin(turn)], 1)
        x = 16 * np.sin(turn) ** 3
        y = -13 * np.cos(turn) + 5 * np.cos(2 * turn) + 2 * np.cos(3 * turn) + np.cos(4 * turn)
        return np.stack([x, y], 1) / 17
    if shape in ('square', 'bar'):
        half = [0.75, 0.75] if shape == 'square' else [1.0, 0.3]
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
    corners, inner = {'triangle': (3, None), 'star': (5, 0.42)}[shape]
    radii = np.ones(corners) if inner is None else np.tile([1.0, inner], corners)
    turn = np.linspace(0, 2 * np.pi, len(radii), endpoint=False) - np.pi / 2
    return np.stack([radii * np.cos(turn), radii * np.sin(turn)], 1)


def draw_image(
    rng: np.random.Generator, classes: Sequence[str]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one image.

    Shapes differ in size, rotation, stretch and shade and may overlap.

    Args:
        rng: The only source of chance.
        classes: Names to draw from, "colour shape".

    Returns:
        image uint8 [IMAGE_SIZE, IMAGE_SIZE, 3] BGR, boxes float64 [N, 4] as absolute (x, y, w, h)
        of the whole shape within the image, labels int64 [N] (indices into ``classes``); N is at
        most 6.
    """
    image = _background(rng)
    masks: list[np.ndarray] = []
    boxes: list[tuple[float, float, float, float]] = []
    labels: list[int] = []
    wanted = int(rng.integers(2, 7))
    for _ in range(4 * wanted):
        if len(boxes) == wanted:
            break
        label = int(rng.integers(len(classes)))
        colour, shape = classes[label].split()
        corners = _placed(rng, outline(shape))
        low = np.clip(corners.min(0), 0, IMAGE_SIZE)
        high = np.clip(corners.max(0), 0, IMAGE_SIZE)
        mask = _filled(corners)
        covered = [
            np.count_nonzero(other & ~mask) < 0.5 * np.count_nonzero(other) for other in masks
        ]
        if any(covered) or (high - low).min() < 8:
            continue
        # Of what an earlier shape has left to show, the next one may take half.
        masks = [*(other & ~mask for other in masks), mask]
        _paint(rng, image, corners, _bgr(rng, colour))
        boxes.append((*low, *(high - low)))
        labels.append(label)
    noise = rng.normal(0, rng.uniform(2, 8), image.shape)
    image = np.clip(image + noise, 0, 255).astype(np.uint8)
    return image, np.array(boxes, dtype=float).reshape(-1, 4), np.array(labels, dtype=np.int64)


def generator(seed: int, split: str, number: int) -> np.random.Generator:
    """The source of chance of one image.

    Args:
        seed: Of the data set.
        split: Name of the split.
        number: Of the image.

    Returns:
        A fresh generator.
    """
    return np.random.default_rng([seed, zlib.crc32(split.encode()), number])


def _background(rng: np.random.Generator) -> np.ndarray:
    """Uneven dull ground with lines, arcs and specks in dull colours. float32 [H, W, 3]"""
    coarse = rng.uniform(30, 190, (4, 4, 1)) + rng.uniform(-22, 22, (4, 4, 3))
    size = (IMAGE_SIZE, IMAGE_SIZE)
    image = cv2.resize(coarse.astype(np.float32), size, interpolation=cv2.INTER_CUBIC)
    for _ in range(int(rng.integers(8, 20))):
        shade = (rng.uniform(20, 210) + rng.uniform(-25, 25, 3)).tolist()
        start, end = rng.integers(0, IMAGE_SIZE, (2, 2)).tolist()
        kind, width = rng.random(), int(rng.integers(1, 3))
        if kind < 0.4:
            cv2.line(image, start, end, shade, width, cv2.LINE_AA)
        elif kind < 0.7:
            axes = rng.integers(5, 40, 2).tolist()
            first, sweep = rng.uniform(0, 360), rng.uniform(40, 200)
            cv2.ellipse(image, start, axes, first, 0, sweep, shade, width, cv2.LINE_AA)
        else:
            cv2.circle(image, start, int(rng.integers(1, 4)), shade, -1, cv2.LINE_AA)
    return np.clip(image, 0, 255)


def _placed(rng: np.random.Generator, corners: np.ndarray) -> np.ndarray:
    """The outline stretched, rotated, scaled and moved, in pixels; a part may leave the image."""
    radius = np.exp(rng.uniform(np.log(11), np.log(32)))
    stretch = np.array([1.0, rng.uniform(0.8, 1.0)])
    angle = rng.uniform(-np.pi / 7, np.pi / 7)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    centre = rng.uniform(0.6 * radius, IMAGE_SIZE - 0.6 * radius, 2)
    return (corners * stretch * radius) @ turn.T + centre


def _bgr(rng: np.random.Generator, colour: str) -> np.ndarray:
    hue, saturation, value = HSV[colour]
    hsv = [
        (hue + rng.uniform(-4, 4)) % 180,
        np.clip(saturation + rng.uniform(-30, 20), 0, 255),
        np.clip(value + rng.uniform(-35, 15), 0, 255),
    ]
    return cv2.cvtColor(np.array([[hsv]], dtype=np.uint8), cv2.COLOR_HSV2BGR)[0, 0].astype(float)


def _fixed(corners: np.ndarray) -> list[np.ndarray]:
    """Pixels to OpenCV's fixed point numbers with 4 fractional bits."""
    return [np.round(corners * 16).astype(np.int32)]


def _filled(corners: np.ndarray) -> np.ndarray:
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    cv2.fillPoly(mask, _fixed(corners - 0.5), (1,), cv2.LINE_8, shift=4)
    return mask.astype(bool)


def _paint(
    rng: np.random.Generator, image: np.ndarray, corners: np.ndarray, colour: np.ndarray
) -> None:
    """Fills the outline, shaded from one side to the other, and sometimes edges it darker."""
    cover = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    cv2.fillPoly(cover, _fixed(corners - 0.5), (255,), cv2.LINE_AA, shift=4)
    alpha = (cover.astype(np.float32) / 255)[..., None]
    slope = np.linspace(rng.uniform(0.82, 1.0), rng.uniform(0.82, 1.0), IMAGE_SIZE)
    shade = slope[:, None, None] if rng.random() < 0.5 else slope[None, :, None]
    image[:] = image * (1 - alpha) + np.clip(colour * shade, 0, 255) * alpha
    if rng.random() < 0.5:
        edge = (colour * rng.uniform(0.4, 0.7)).tolist()
        cv2.polylines(image, _fixed(corners - 0.5), True, edge, 1, cv2.LINE_AA, shift=4)


def write_shapes(
    root: Union[str, os.PathLike],
    seed: int = 0,
    splits: Optional[Mapping[str, Split]] = None,
) -> Path:
    """Writes splits as COCO folders; what is there already and right is left alone.

    Args:
        root: Folder to write to; made where it is missing.
        seed: Of the whole data set.
        splits: By name; all of :data:`SPLITS` by default.

    Returns:
        ``root``.
    """
    root = Path(root)
    for name, split in (SPLITS if splits is None else splits).items():
        # The drawing code is part of the recipe: change it, and the images are drawn again.
        recipe = hashlib.sha256(Path(__file__).read_bytes() + repr((seed, name, split)).encode())
        if not _is_written(root, name, split, recipe.hexdigest()):
            print(f'drawing {split.images} images: {root / name}', flush=True)
            _write_split(root, name, split, seed, recipe.hexdigest())
    return root


def _is_written(root: Path, name: str, split: Split, recipe: str) -> bool:
    try:
        written = json.loads((root / 'annotations' / f'{name}.json').read_text(encoding='utf-8'))
        found = sum(file.endswith('.jpg') for file in os.listdir(root / name))
        return written['info']['recipe'] == recipe and found == split.images
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_split(root: Path, name: str, split: Split, seed: int, recipe: str) -> None:
    coco: dict = dict(
        info=dict(description=f'shapes, {name}', recipe=recipe),
        licenses=[],
        images=[],
        annotations=[],
        categories=[dict(id=i, name=c, supercategory='') for i, c in enumerate(split.classes, 1)],
    )
    unfinished = root / f'.{name}-{os.getpid()}'
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        for number in range(split.images):
            image, boxes, labels = draw_image(generator(seed, name, number), split.classes)
            file_name = f'{number:06d}.jpg'
            # Encoded here and written by Python: cv2.imwrite reports a full disk as False.
            encoded = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
            (unfinished / file_name).write_bytes(encoded.tobytes())
            coco['images'].append(
                dict(id=number, file_name=file_name, width=IMAGE_SIZE, height=IMAGE_SIZE)
            )
            for box, label in zip(boxes.round(2).tolist(), labels.tolist()):
                coco['annotations'].append(
                    dict(
                        id=len(coco['annotations']) + 1,
                        image_id=number,
                        category_id=label + 1,
                        bbox=box,
                        area=round(box[2] * box[3], 2),
                        iscrowd=0,
                    )
                )
        annotations = root / 'annotations' / f'{name}.json'
        annotations.parent.mkdir(exist_ok=True)
        # The annotations go first and come last: while they are there, the images are whole.
        annotations.unlink(missing_ok=True)
        shutil.rmtree(root / name, ignore_errors=True)
        os.replace(unfinished, root / name)
        partial = annotations.with_suffix(f'.{os.getpid()}')
        partial.write_text(json.dumps(coco), encoding='utf-8')
        os.replace(partial, annotations)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def main() -> None:
    """Command line: where to write, and the seed."""
    parser = argparse.ArgumentParser(description='Draw the shapes data set in COCO format')
    parser.add_argument('root', nargs='?', default='data/shapes', help='default: data/shapes')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    print(f'the shapes data set is in {write_shapes(args.root, args.seed)}')


if __name__ == '__main__':
    main()

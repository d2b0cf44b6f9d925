"""Detections as labels in COCO's format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet_gdino_lora.checks.coco_file import CocoFile, check_entries, need_no_folder, read_coco
from mmdet_gdino_lora.checks.findings import tell
from mmdet_gdino_lora.checks.words import some
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.labelling.detections import PIXELS, Found


def as_coco(
    found: Mapping[str, Found], names: Sequence[str], thresholds: Sequence[float]
) -> dict[str, Any]:
    """Writes what was found as a data set that training reads.

    Args:
        found: In each photo, by its name; photos that can't be read are left out.
        names: Class names, in the order of the config: mmdet numbers labels by the file's.
        thresholds: Of each class.

    Returns:
        The file's content. Annotations have ``score`` besides what COCO's have.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for name, one in found.items():
        if one.unreadable:
            continue
        image = dict(id=len(images) + 1, file_name=name, width=one.width, height=one.height)
        images.append(image)
        for place in one.above(thresholds):
            number = len(annotations) + 1
            annotations.append(annotation(one, place, number, image['id'], one.labels[place] + 1))
    categories = [dict(id=number, name=name) for number, name in enumerate(names, 1)]
    info = dict(description='detections', thresholds=dict(zip(names, thresholds)))
    return dict(info=info, images=images, annotations=annotations, categories=categories)


def annotation(found: Found, place: int, number: int, image: Any, category: Any) -> dict[str, Any]:
    """Writes one detection as an annotation.

    Args:
        found: In a photo.
        place: Of the box in it.
        number: The annotation's id.
        image: The image's id.
        category: The category's id.
    """
    width, height = found.boxes[place][2:]
    return dict(
        id=number,
        image_id=image,
        category_id=category,
        bbox=found.boxes[place],
        area=round(width * height, PIXELS),
        iscrowd=0,
        segmentation=[],  # importers of label tools want the field
        score=found.scores[place],
    )


def read_labelled(path: str, names: Sequence[str]) -> CocoFile:
    """Reads the set that is to be completed.

    Args:
        path: ``--complete``.
        names: The config's classes.

    Returns:
        The file.

    Raises:
        ConfigError: It is not there, no COCO file, or of other classes.
    """
    need_no_folder('--complete', path)
    if not os.path.isfile(path):
        raise ConfigError(f'--complete {path!r}: no such file; name the labelled COCO file')
    coco = read_coco(path, f'--complete {path!r}')
    tell(check_entries(coco))
    missing = [name for name in names if name not in coco.names]
    if missing:
        raise ConfigError(
            f'--complete {path!r} has no category {some(missing)} of the config, but '
            f'{some(coco.names, 20)}; name the file that the config trains from'
        )
    return coco

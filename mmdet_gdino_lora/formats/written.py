"""COCO's format, made of photos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmdet_gdino_lora.formats.photos import Labelled, Photo, numbered


def as_coco(labelled: Labelled, photos: Sequence[Photo], categories: list[dict]) -> dict[str, Any]:
    """Writes photos as the content of a COCO file.

    Args:
        labelled: Whose photos they are.
        photos: Some of them.
        categories: See :func:`categories_of`; the same for every split.

    Returns:
        The file's content; what a COCO file said of images and annotations is kept.
    """
    ids = {category['name']: category['id'] for category in categories}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    given = [box.entry.get('id') for photo in photos for box in photo.boxes]
    keep = all(type(id_) in (int, str) for id_ in given) and len(set(given)) == len(given)
    for image_id, photo in numbered(list(photos)):
        width, height = photo.size
        own = dict(id=image_id, file_name=labelled.file_name(photo), width=width, height=height)
        images.append({**photo.entry, **own})
        for box in photo.boxes:
            own = dict(
                id=given[len(annotations)] if keep else len(annotations) + 1,
                image_id=image_id,
                category_id=ids[box.name],
                bbox=box.bbox,
                iscrowd=int(box.crowd),
            )
            annotations.append({'area': _area(box.bbox), **box.entry, **own})
    return dict(
        info=dict(description=f'{labelled.root}, {labelled.format}'),
        images=images,
        annotations=annotations,
        categories=categories,
    )


def categories_of(names: Sequence[str], ids: dict[str, Any]) -> list[dict]:
    """Writes class names as COCO's categories.

    Args:
        names: Class names in their order.
        ids: By name; those of a COCO file, if it has any.

    Returns:
        An entry for each name; ids from 1 on where a name has none.
    """
    known = all(name in ids for name in names)
    return [
        dict(id=ids[name] if known else number, name=name) for number, name in enumerate(names, 1)
    ]


def _area(bbox: Any) -> Any:
    is_box = isinstance(bbox, list) and len(bbox) == 4
    if not is_box or not {type(value) for value in bbox} <= {int, float}:
        return 0
    return round(bbox[2] * bbox[3], 2)

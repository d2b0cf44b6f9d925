"""What of an annotation file mmdet would drop, read otherwise than meant, or not load.

``CocoDataset.parse_data_info`` drops a box in silence when it has no overlap with its image (the
size is the file's), a side below a pixel, an area of 0, or a category that the config doesn't name.
What reaches out of the image it keeps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import numpy as np

from mmdet_gdino_lora.checks.coco_file import CocoFile
from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.words import share

#: Pixels that a box may reach out of its image: rounding, and boxes counted from 1.
_OUTSIDE = 2.0
#: Share of boxes that have to fit as (x1, y1, x2, y2), and that have to reach out as (x, y, w, h).
_FIT_AS_CORNERS, _OUT_AS_SIZES = 0.99, 0.1


@dataclasses.dataclass(frozen=True)
class Boxes:
    """The annotations of a file in arrays, each with N rows.

    Attributes:
        coco: The file.
        image: Place of the image in the file's list, -1 where it isn't listed.
        known: Whether the category is one of the file's.
        wanted: Whether the category is one that the config names.
        bbox: The numbers [N, 4]; NaN where there are none.
        right: Whether there are four numbers.
        area: NaN where there is none.
        size: Width and height of the image [N, 2], as the file has it.
        ignored: Whether mmdet passes the annotation over (``ignore=1``).
    """

    coco: CocoFile
    image: np.ndarray
    known: np.ndarray
    wanted: np.ndarray
    bbox: np.ndarray
    right: np.ndarray
    area: np.ndarray
    size: np.ndarray
    ignored: np.ndarray

    @classmethod
    def of(cls, coco: CocoFile, classes: Sequence[str]) -> Boxes:
        """Puts a file's annotations into arrays.

        Args:
            coco: The file, whose entries have the fields that mmdet reads.
            classes: Names that the data set will use.

        Returns:
            The arrays.
        """
        entries = coco.annotations
        places = {image['id']: place for place, image in enumerate(coco.images)}
        categories = {category['id']: category['name'] for category in coco.categories}
        wanted = {id_ for id_, name in categories.items() if name in set(classes)}
        boxes = [_numbers(entry.get('bbox')) for entry in entries]
        none = [np.nan] * 4
        bbox = np.array([none if box is None else box for box in boxes], dtype=float).reshape(-1, 4)
        image = np.array([places.get(entry['image_id'], -1) for entry in entries], dtype=np.int64)
        sizes = np.array([(i['width'], i['height']) for i in coco.images], dtype=float)
        areas = (entry.get('area') for entry in entries)
        return cls(
            coco=coco,
            image=image,
            known=np.array([entry['category_id'] in categories for entry in entries], dtype=bool),
            wanted=np.array([entry['category_id'] in wanted for entry in entries], dtype=bool),
            bbox=bbox,
            right=np.array([box is not None for box in boxes], dtype=bool),
            area=np.array([a if type(a) in (int, float) else np.nan for a in areas], dtype=float),
            size=sizes[image],
            ignored=np.array([bool(entry.get('ignore')) for entry in entries], dtype=bool),
        )

    @property
    def loaded(self) -> np.ndarray:
        """Those that mmdet reads."""
        return (self.image >= 0) & ~self.ignored

    @property
    def overlap(self) -> np.ndarray:
        """Whether a box has an overlap with its image."""
        low, high = self.bbox[:, :2], self.bbox[:, :2] + self.bbox[:, 2:]
        return (np.minimum(high, self.size) - np.maximum(low, 0) > 0).all(1)

    def finding(
        self, rows: np.ndarray, problem: str, fatal: bool = False, total: Optional[int] = None
    ) -> Iterator[Finding]:
        """Tells of rows, if there are any, with their number and the first of them.

        Args:
            rows: Bool [N].
            problem: What they have, what it leads to, and the remedy.
            fatal: Whether the run may not go on.
            total: Of how many; of all by default.

        Yields:
            One finding or none.
        """
        if not rows.any():
            return
        count = share(int(rows.sum()), total or len(rows), 'boxes')
        named = tuple(map(self._named, np.flatnonzero(rows).tolist()))
        yield Finding(f'{self.coco.where}: {count} {problem}; first: {named[0]}', fatal, named)

    def _named(self, place: int) -> str:
        entry: dict[str, Any] = self.coco.annotations[place]
        image = (
            f'image {self.coco.images[self.image[place]]["file_name"]}'
            if self.image[place] >= 0
            else f'image_id {entry["image_id"]!r}'
        )
        bbox = f', bbox={entry["bbox"]!r}' if 'bbox' in entry else ''
        return f'{image}, annotation {entry["id"]!r}{bbox}'


def check_annotations(boxes: Boxes, trains: bool, thorough: bool = False) -> list[Finding]:
    """Finds boxes that are not as a person would have meant them.

    Args:
        boxes: Of a file.
        trains: Whether the data set is trained from; else it is measured on.
        thorough: Whether the others are looked at where some can't be read.

    Returns:
        Findings: fatal where mmdet could not load the file, most boxes are surely written in
        another way than COCO's, or none is left to learn from.
    """
    if not len(boxes.right):
        return _no_annotations(boxes.coco, trains)
    unreadable = list(_unreadable(boxes))
    if unreadable and not thorough:
        return unreadable
    return unreadable + (
        list(_other_formats(boxes))
        or [*_nowhere(boxes, trains), *_dropped(boxes, trains), *_repeated(boxes, trains)]
    )


def places_read(
    boxes: Boxes, filter_empty: bool, min_size: float, indices: Any = None
) -> list[int]:
    """Finds the images that a data set will read, as ``CocoDataset.filter_data`` does.

    Args:
        boxes: Of its file.
        filter_empty: Whether images without an annotation of a class are left out.
        min_size: Shortest side of images that are kept.
        indices: Of the data set's config: a number of images or their places, None for all.

    Returns:
        Places in the file's list of images.
    """
    with_boxes = set(boxes.image[boxes.wanted].tolist())
    places = [
        place
        for place, image in enumerate(boxes.coco.images)
        if (place in with_boxes or not filter_empty)
        and min(image['width'], image['height']) >= min_size
    ]
    if isinstance(indices, int):
        return places[:indices] if indices >= 0 else places[indices:]
    return places if indices is None else [places[index] for index in indices]


def _no_annotations(coco: CocoFile, trains: bool) -> list[Finding]:
    told = (
        'there is nothing to learn from; name the file that has the boxes'
        if trains
        else 'there is nothing to measure on and every AP would be -1; name the file that has the '
        'boxes'
    )
    return [
        Finding(
            f'{coco.where} has no annotations for its {len(coco.images)} images, so {told}', trains
        )
    ]


def _unreadable(boxes: Boxes) -> Iterator[Finding]:
    yield from boxes.finding(
        boxes.loaded & ~boxes.right,
        'have no bbox of four numbers, and mmdet could not load the file; write bbox=[x, y, width, '
        'height] in pixels or take them out',
        fatal=True,
    )
    yield from boxes.finding(
        boxes.loaded & boxes.overlap & np.isnan(boxes.area),
        "have no number as 'area', which mmdet reads, so that it could not load the file; write "
        'area=width * height of the box where there is no mask',
        fatal=True,
    )


def _other_formats(boxes: Boxes) -> Iterator[Finding]:
    """Most boxes relative to the image's size, or corners in the place of sizes."""
    used = boxes.loaded & boxes.wanted & np.isfinite(boxes.bbox).all(1)
    count = int(used.sum())
    with np.errstate(invalid='ignore'):
        sized = used & (boxes.bbox[:, 2:] > 0).all(1)
        relative = sized & ((boxes.bbox >= 0) & (boxes.bbox <= 1)).all(1)
        high = boxes.bbox[:, :2] + boxes.bbox[:, 2:]
        out = sized & (high > boxes.size + _OUTSIDE).any(1)
        as_corners = (boxes.bbox[:, 2:] > boxes.bbox[:, :2]).all(1)
        as_corners &= (boxes.bbox[:, 2:] <= boxes.size + _OUTSIDE).all(1)
    if count and relative.sum() >= count / 2:
        yield from boxes.finding(
            relative,
            "lie in 0..1, as if relative to the image's size, while COCO's are in pixels, and "
            'mmdet drops boxes below a pixel; multiply x and width by the width of the image, y '
            'and height by its height',
            fatal=True,
            total=count,
        )
    elif (
        out.sum() >= max(2, _OUT_AS_SIZES * count)
        and (used & as_corners).sum() >= _FIT_AS_CORNERS * count
    ):
        yield from boxes.finding(
            out,
            'reach out of their image as [x, y, width, height], while nearly all fit as [x1, y1, '
            "x2, y2], which COCO's format is not; write bbox=[x1, y1, x2 - x1, y2 - y1]",
            fatal=True,
            total=count,
        )


def _nowhere(boxes: Boxes, trains: bool) -> Iterator[Finding]:
    """Annotations of images or categories that the file doesn't list."""
    listed = boxes.image >= 0
    yield from boxes.finding(
        ~listed,
        "have an image_id that is not among the file's images and are never read; list their "
        'images or correct image_id',
    )
    left = 'are trained as background' if trains else 'are not measured'
    for row in np.flatnonzero(listed & ~boxes.known)[:1]:
        yield from boxes.finding(
            listed & ~boxes.known,
            f"have a category_id that is not among the file's categories and {left}; list their "
            f'categories or correct category_id={boxes.coco.annotations[row]["category_id"]!r}',
        )


def _dropped(boxes: Boxes, trains: bool) -> Iterator[Finding]:
    """Boxes that mmdet drops, told by the reason, and whether any is left."""
    fate = (
        'mmdet drops them, and their objects are trained as background'
        if trains
        else 'hardly any detection can match them, so that they count as missed'
    )
    kept = boxes.loaded & boxes.wanted & boxes.right
    with np.errstate(invalid='ignore'):
        broken = ~np.isfinite(boxes.bbox).all(1)
        flat = (boxes.bbox[:, 2:] <= 0).any(1)
        thin = (boxes.bbox[:, 2:] < 1).any(1)
        no_area = boxes.area <= 0
        reaching = (boxes.bbox[:, :2] < -_OUTSIDE).any(1)
        reaching |= (boxes.bbox[:, :2] + boxes.bbox[:, 2:] > boxes.size + _OUTSIDE).any(1)
    yield from boxes.finding(
        kept & broken, f'hold NaN or infinity: {fate}; correct them or take them out'
    )
    kept = kept & ~broken
    yield from boxes.finding(
        kept & flat, f'have a width or height of 0 or less: {fate}; correct them or take them out'
    )
    kept = kept & ~flat
    yield from boxes.finding(
        kept & thin, f'are thinner than a pixel: {fate}; correct them or take them out'
    )
    kept = kept & ~thin
    yield from boxes.finding(
        kept & ~boxes.overlap,
        f"lie outside of their image: {fate}; correct them or the image's size, or take them out",
    )
    kept = kept & boxes.overlap
    yield from boxes.finding(
        kept & no_area,
        f'have an area of 0 or less: {fate}; write area=width * height or take them out',
    )
    kept = kept & ~no_area
    if trains and not kept.any():
        total = len(kept)
        yield Finding(
            f'{boxes.coco.where}: nothing is left to learn, for none of its {total:,} boxes is one '
            'that mmdet keeps (of a class in metainfo.classes, at least a pixel wide and high, in '
            'an image of the file); correct the boxes, or name the file that was meant',
            fatal=True,
        )
    yield from boxes.finding(
        kept & reaching,
        f'reach more than {_OUTSIDE:g} pixels out of their image, and what is outside is cut off '
        "where the pipeline resizes; correct them or the image's width and height",
    )


def _repeated(boxes: Boxes, trains: bool) -> Iterator[Finding]:
    """Boxes of the numbers, class and image of an earlier one."""
    kept = np.flatnonzero(boxes.loaded & boxes.wanted & np.isfinite(boxes.bbox).all(1))
    places = {category['id']: place for place, category in enumerate(boxes.coco.categories)}
    label = [places[boxes.coco.annotations[row]['category_id']] for row in kept.tolist()]
    numbers = np.column_stack([boxes.image[kept], np.array(label, dtype=float), boxes.bbox[kept]])
    order = np.lexsort(numbers.T)  # of the same numbers the first stays the first
    same = (numbers[order[1:]] == numbers[order[:-1]]).all(1)
    again = np.zeros(len(boxes.right), dtype=bool)
    again[kept[order[1:][same]]] = True
    fate = (
        'each is matched to a query of its own, so that the model learns to find such things twice'
        if trains
        else 'one of each counts as missed unless a thing is found twice'
    )
    yield from boxes.finding(
        again, f'are the same box of the same class once more, and {fate}; take the copies out'
    )


def _numbers(bbox: Any) -> Optional[list]:
    is_box = isinstance(bbox, list) and len(bbox) == 4 and set(map(type, bbox)) <= {int, float}
    return bbox if is_box else None

"""Boxes that a labelled set lacks: which detections they are, and from which score on.

Of a detection that lies on a label of its class one knows that it is right. Of one that lies on no
label one knows nothing: it is a mistake, or right and the label is missing. To count it as a
mistake, as evaluation does, is biased where labels are missing: with half of the things labelled no
threshold reaches a precision of 50 %. :func:`threshold_of` says what is counted instead.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np

from mmdet_gdino_lora.labelling.coco import annotation
from mmdet_gdino_lora.labelling.detections import Found, overlaps

#: Share of the added boxes that shall be right, where nobody says another one.
RIGHT = 0.95
#: IoU from which on a detection is of the label's thing.
ON_LABEL = 0.5
#: Share of the detections on labels that are taken as the surest, and how many there have to be.
SUREST, LEAST = 0.5, 10
#: Share of the surest that is taken to be of nothing: it can't be counted.
WRONG = 0.01
#: Standard errors by which the precision is taken lower than it is counted. Where boxes are few
#: the lowest threshold that seems good enough is so by luck.
CAUTION = 1.0


@dataclasses.dataclass(frozen=True)
class Sorted:
    """Detections in one photo, held against its labels.

    Attributes:
        on_labels: Places of those on a label of their class, one for each label.
        mistaken: Places of those that would be mistakes, were the label missing: on a label of
            another class, or badly placed, and the surest there.
        free: Places of those that overlap no label and no surer one of these.
    """

    on_labels: list[int]
    mistaken: list[int]
    free: list[int]


def sort_out(
    found: Found, boxes: Any, labels: Sequence[int], crowds: Sequence[int], bound: float
) -> Sorted:
    """Holds the detections in a photo against its labels.

    Args:
        found: In the photo.
        boxes: [N, 4] of the labels, absolute (x, y, width, height).
        labels: Their classes' places in the list of names; -1 for classes that aren't in it.
        crowds: Which of them are crowds.
        bound: IoU with any label from which on a detection overlaps it.

    Returns:
        All kinds. Each label is taken by the surest detection that overlaps it, as a thing without
        a label is; what else overlaps labels, or lies in a crowd, is of no kind.
    """
    shared = overlaps(found.boxes, boxes, crowds)
    own = np.array(found.labels, int)[:, None] == np.array(labels, int).reshape(1, -1)
    right, near = (shared >= ON_LABEL) & own, shared >= bound
    open_ = ~np.array(crowds, bool)
    on_labels: list[int] = []
    mistaken: list[int] = []
    free: list[int] = []
    among = overlaps(found.boxes, found.boxes)
    for place in range(len(found.boxes)):  # the surest first
        for kind, fits in ((on_labels, right[place] & open_), (mistaken, near[place] & open_)):
            if fits.any():
                open_[np.where(fits, shared[place], -1).argmax()] = False
                kind.append(place)
                break
        else:
            if not near[place].any() and among[place, free].max(initial=0) < bound:
                free.append(place)
    return Sorted(on_labels, mistaken, free)


def sort_all(
    images: Sequence[Mapping[str, Any]],
    boxes: Sequence[Mapping[str, Any]],
    numbers: Mapping[Any, int],
    found: Mapping[str, Found],
    bound: float,
) -> Iterator[tuple[Mapping[str, Any], Found, Sorted]]:
    """Holds the detections in a COCO file's photos against their labels.

    Args:
        images: Its entries of photos.
        boxes: Its annotations, of these and of other photos.
        numbers: The detector's number of a class by its category id.
        found: In each photo, by ``file_name``.
        bound: As for :func:`sort_out`.

    Yields:
        For each photo its entry, what was found, and of which kind each is.
    """
    of_image = defaultdict(list)
    for box in boxes:
        of_image[box['image_id']].append(box)
    for image in images:
        one, own = found[image['file_name']], of_image[image['id']]
        labels = [numbers.get(box['category_id'], -1) for box in own]
        crowds = [int(box.get('iscrowd', 0)) for box in own]
        yield image, one, sort_out(one, [box['bbox'] for box in own], labels, crowds, bound)


def odds_among(on_labels: int, free: int) -> float:
    """How many things without a label there are for every one that has one.

    Args:
        on_labels: Number of sure detections on labels, above 0.
        free: Number of those, as sure, that overlap no label.

    Returns:
        The odds; not above 0 where all of the free ones may be the mistakes of a sure detector.
    """
    return float((free - WRONG * (on_labels + free)) / on_labels)


def threshold_of(
    on_labels: np.ndarray,
    free: np.ndarray,
    mistaken: Union[np.ndarray, Sequence[float]] = (),
    share: float = RIGHT,
) -> Optional[float]:
    """Chooses from which score on detections of a class that overlap no label are added.

    Let labels be missing by chance, whatever the score of the detection there. Then for every
    detection on a label there are, at any score, as many right ones on no label as there are things
    without a label for every labelled one: a constant, the odds. Among the surest detections nearly
    all are of things, and there the odds can be counted:

        odds = free among the surest / on labels, right or mistaken, among the surest

    From a lower score s on, ``odds * on_labels(s)`` of the ``free(s)`` are right; what there is
    more are mistakes. Things have another class or place than the detector says, too: how often,
    the labelled ones tell, of the surest and of what is surer still. The lowest s is chosen at
    which the share of right ones, a standard error taken off, is high enough. It is an
    unbiased estimate under two conditions. That labels are missing by chance fails for a detector
    that was trained long on the same incomplete labels: it learns what is not labelled as
    background, the surest are those with labels, the odds come out too small, and too few boxes are
    added or none. A detector that was trained on other photos (the other half of the set, say) has
    no such bias. That the surest are things fails where few labels are missing: of the surest,
    :data:`WRONG` is taken to be nothing, and where that alone is more than 5 % of what is free,
    none is added.

    Args:
        on_labels: Scores of the detections on labels.
        free: Scores of those that overlap no label.
        mistaken: Scores of those that are the surest on a label, and wrong.
        share: Of what is added, that shall be right.

    Returns:
        The threshold; None where there is none, or too few labels to tell.
    """
    if len(on_labels) < LEAST / SUREST or not len(free):
        return None
    surest = float(np.quantile(on_labels, 1 - SUREST, method='nearest'))
    scores = np.unique([surest, *free])
    labelled, others, wrong = (
        (np.asarray(part) >= scores[:, None]).sum(1) for part in (on_labels, free, mistaken)
    )
    things = labelled + wrong
    # From the surest on, nearly all are of things, and the labelled ones tell how many are right.
    of_things = 1 - WRONG * (things + others) / np.maximum(others, 1)
    right = of_things * labelled / np.maximum(things, 1)
    variance = wrong / np.maximum(labelled * things, 1)
    top = int(np.searchsorted(scores, surest))
    if not others[top]:
        return None
    odds = odds_among(things[top], others[top])
    right[:top] = odds * labelled[:top] / others[:top]
    variance[:top] = variance[top] + 1 / others[top] - 1 / others[:top]
    variance[:top] += 1 / labelled[top] - 1 / labelled[:top]
    sure = right * np.exp(-CAUTION * np.sqrt(variance)) >= share
    enough = scores[sure & (labelled >= LEAST)]
    return float(enough.min()) if len(enough) else None


def complete(
    content: Mapping[str, Any],
    found: Mapping[str, Found],
    names: Sequence[str],
    given: Sequence[Optional[float]],
    bound: float,
    share: float = RIGHT,
) -> tuple[dict[str, Any], list[Optional[float]]]:
    """Adds to a labelled set the boxes that it lacks.

    Args:
        content: Of a COCO file; it is not changed.
        found: In each of its images, by ``file_name``.
        names: Class names, all of them among its categories.
        given: The threshold of each class that a person gave; None: it is chosen.
        bound: IoU with any label from which on nothing is added.
        share: Of what is added, that shall be right.

    Returns:
        The content with the boxes, which have a ``score`` and ``completed=True``; and the threshold
        of each class, None where none could be chosen and nothing is added.
    """
    categories = {category['name']: category['id'] for category in content['categories']}
    numbers = {categories[name]: number for number, name in enumerate(names)}
    images, boxes = content['images'], content['annotations']
    sorted_ = list(sort_all(images, boxes, numbers, found, bound))
    thresholds = list(given)
    for label, threshold in enumerate(given):
        if threshold is None:
            scores = [
                [one.scores[p] for p in part if one.labels[p] == label]
                for _, one, kinds in sorted_
                for part in (kinds.on_labels, kinds.free, kinds.mistaken)
            ]
            on_labels, free, mistaken = (np.array(sum(scores[k::3], [])) for k in range(3))
            thresholds[label] = threshold_of(on_labels, free, mistaken, share)
    reached = [2.0 if threshold is None else threshold for threshold in thresholds]
    number = max((box['id'] for box in boxes if type(box['id']) is int), default=0)
    added: list[dict[str, Any]] = []
    for image, one, kinds in sorted_:
        for place in sorted(set(kinds.free) & set(one.above(reached))):
            category = categories[names[one.labels[place]]]
            box = annotation(one, place, number + len(added) + 1, image['id'], category)
            added.append(dict(box, completed=True))
    return {**content, 'annotations': [*boxes, *added]}, thresholds

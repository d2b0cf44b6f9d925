"""How good detections are by class, the threshold that suits each, and what is taken for what."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Sequence
from typing import Optional

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import iou

from mmdet_gdino_lora.report.detect import Seen

#: A box is found where it overlaps by this much.
OVERLAP = 0.5
#: The lowest score of classes for which validation says nothing; image-demo's own.
OTHERWISE = 0.3
#: In a :class:`Verdict`: the score is below the threshold, or the box lies on a crowd.
LEFT_OUT = -2
#: In a :class:`Verdict`: nothing belongs to it.
NONE = -1


@dataclasses.dataclass(frozen=True)
class Threshold:
    """The lowest score of a class, and what comes of it on validation.

    Attributes:
        score: Detections with at least this score are kept.
        precision: How many of those are right.
        recall: How many of the class's boxes are found.
        f1: Their harmonic mean, the best that a threshold can have.
    """

    score: float
    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True)
class OfClass:
    """What validation says of one class.

    Attributes:
        name: Of the class.
        boxes: How many there are.
        ap: COCO's, over ten overlaps; None without boxes.
        ap50: At an overlap of 0.5; the same.
        threshold: None where nothing of the class is ever found, or there are no boxes.
    """

    name: str
    boxes: int
    ap: Optional[float]
    ap50: Optional[float]
    threshold: Optional[Threshold]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What belongs together in one image, at the classes' thresholds.

    Attributes:
        truth: Of each true box the number of the detection that lies on it, or ``NONE`` [N].
        found: Of each detection the number of the true box under it, ``NONE`` or ``LEFT_OUT`` [M].
    """

    truth: np.ndarray
    found: np.ndarray


class Measurement:
    """Detections beside the truth, matched as COCO's metric does.

    Args:
        seen: Of every image.
        names: Of the classes.
    """

    def __init__(self, seen: Sequence[Seen], names: Sequence[str]) -> None:
        self.seen, self.names = seen, names
        with contextlib.redirect_stdout(io.StringIO()):
            self._truth = _as_coco(
                [(s.truth, s.labels, s.ignored, None) for s in seen], seen, names
            )
            self._found = _as_coco([(s.boxes, s.found, None, s.scores) for s in seen], seen, names)
            metric = COCOeval(self._truth, self._found, 'bbox')
            metric.params.areaRng, metric.params.areaRngLbl = [[0, 1e10]], ['all']
            # mmdet's, so that these figures are the log's
            metric.params.maxDets = [1000]
            metric.evaluate()
            metric.accumulate()
        self._precision = metric.eval['precision'][:, :, :, 0, 0]
        # pycocotools has the classes outside, the images inside
        self._matched = [
            metric.evalImgs[k * len(seen) : (k + 1) * len(seen)] for k in range(len(names))
        ]
        self.classes = [self._of_class(label) for label in range(len(names))]

    @property
    def mean(self) -> Optional[float]:
        """COCO's AP over the classes that have boxes; None where none has."""
        known = [c.ap for c in self.classes if c.ap is not None]
        return float(np.mean(known)) if known else None

    def _of_class(self, label: int) -> OfClass:
        boxes = sum(int(((s.labels == label) & ~s.ignored).sum()) for s in self.seen)
        of_class = [match for match in self._matched[label] if match]
        right = [m['dtMatches'][0] > 0 for m in of_class]
        counts = [~np.asarray(m['dtIgnore'][0], dtype=bool) for m in of_class]
        scores = [np.asarray(m['dtScores'], dtype=float) for m in of_class]
        threshold = None
        if scores and boxes:
            kept = np.concatenate(counts)
            threshold = best_threshold(
                np.concatenate(scores)[kept], np.concatenate(right)[kept], boxes
            )
        average = [_mean_known(self._precision[t, :, label]) for t in (slice(None), 0)]
        return OfClass(self.names[label], boxes, average[0], average[1], threshold)

    def lowest_scores(self) -> np.ndarray:
        """The lowest score of each class that is kept [C]."""
        return np.array([c.threshold.score if c.threshold else OTHERWISE for c in self.classes])

    def verdicts(self) -> list[Verdict]:
        """Says what belongs together in each image.

        A detection first belongs to the true box of its own class that COCO's metric gives it;
        what is left over is put together across classes, by falling overlap.
        """
        lowest = self.lowest_scores()
        made = []
        for number, seen in enumerate(self.seen):
            verdict = Verdict(np.full(len(seen.labels), NONE), np.full(len(seen.found), NONE))
            verdict.found[seen.scores < lowest[seen.found]] = LEFT_OUT
            for matches in self._matched:
                for d, t, crowd in self._pairs(matches[number]):
                    if crowd:
                        verdict.found[d] = LEFT_OUT
                    elif verdict.found[d] != LEFT_OUT:
                        verdict.found[d], verdict.truth[t] = t, d
            _across_classes(seen, verdict)
            made.append(verdict)
        return made

    def _pairs(self, match: Optional[dict]) -> Iterator[tuple[int, int, bool]]:
        """Detection, true box, and whether that is a crowd, of one class in one image."""
        if match:
            of_detections = zip(match['dtIds'], match['dtMatches'][0], match['dtIgnore'][0])
            for detection, box, crowd in of_detections:
                if box:
                    place = self._found.anns[detection]['place']
                    yield place, self._truth.anns[int(box)]['place'], bool(crowd)

    def confusion(self, verdicts: Sequence[Verdict]) -> np.ndarray:
        """Counts what is taken for what.

        Args:
            verdicts: Of :meth:`verdicts`.

        Returns:
            [C + 1, C + 1]: a row for each true class, a column for what it was taken for; the last
            column is missed, the last row is invented.
        """
        none = len(self.names)
        table = np.zeros((none + 1, none + 1), dtype=int)
        for seen, verdict in zip(self.seen, verdicts):
            for label, detection in zip(seen.labels[~seen.ignored], verdict.truth[~seen.ignored]):
                table[label, none if detection == NONE else seen.found[detection]] += 1
            for label in seen.found[verdict.found == NONE]:
                table[none, label] += 1
        return table


def best_threshold(scores: np.ndarray, right: np.ndarray, boxes: int) -> Optional[Threshold]:
    """Finds the threshold with the best F1; of several the highest.

    It lies in the middle between the lowest score that is kept and the next one below.

    Args:
        scores: Of the detections [M].
        right: Which of them are right, each true box counted once [M].
        boxes: How many true boxes there are.

    Returns:
        The threshold; None where no detection is right.
    """
    order = np.argsort(-scores, kind='stable')
    scores, hits = scores[order], np.cumsum(right[order])
    if not len(hits) or not hits[-1]:
        return None
    kept = np.arange(1, len(scores) + 1)
    f1 = 2 * hits / (kept + boxes)
    f1[:-1][scores[:-1] == scores[1:]] = -1  # equal scores are kept together
    best = int(f1.argmax())
    below = scores[best + 1] if best + 1 < len(scores) else scores[best]
    score = float((scores[best] + below) / 2)
    precision, recall = float(hits[best] / kept[best]), float(hits[best] / boxes)
    return Threshold(score, precision, recall, float(f1[best]))


def quality(seen: Seen, verdict: Verdict) -> tuple[float, int]:
    """How good one image is.

    Args:
        seen: The image.
        verdict: Its own.

    Returns:
        F1 over all its classes, 1 where there is nothing and nothing was found; and the number of
        right detections, less that of mistakes.
    """
    hits = int((right(seen, verdict)).sum())
    kept = int((verdict.found != LEFT_OUT).sum())
    boxes = int((~seen.ignored).sum())
    return (2 * hits / (kept + boxes) if kept + boxes else 1.0), 3 * hits - kept - boxes


def right(seen: Seen, verdict: Verdict) -> np.ndarray:
    """Tells which detections lie on a true box of their own class.

    Args:
        seen: The image.
        verdict: Its own.

    Returns:
        bool [M].
    """
    on = verdict.found >= 0
    result = np.zeros(len(on), dtype=bool)
    result[on] = seen.labels[verdict.found[on]] == seen.found[on]
    return result


def _mean_known(precision: np.ndarray) -> Optional[float]:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None


def _as_coco(parts: Sequence[tuple], seen: Sequence[Seen], names: Sequence[str]) -> COCO:
    """Boxes of every image as COCO's index, each with its place among those of its image."""
    coco = COCO()
    boxes = [
        dict(
            place=place,
            image_id=number,
            category_id=int(label),
            bbox=[*corners[:2].tolist(), *(corners[2:] - corners[:2]).tolist()],
            area=float((corners[2:] - corners[:2]).prod()),
            iscrowd=int(ignored is not None and ignored[place]),
            score=None if scores is None else float(scores[place]),
        )
        for number, (of_image, labels, ignored, scores) in enumerate(parts)
        for place, (corners, label) in enumerate(zip(of_image, labels))
    ]
    for number, box in enumerate(boxes, 1):
        box['id'] = number
    coco.dataset = dict(
        images=[dict(id=i, width=s.size[0], height=s.size[1]) for i, s in enumerate(seen)],
        categories=[dict(id=label, name=name) for label, name in enumerate(names)],
        annotations=boxes,
    )
    coco.createIndex()
    return coco


def _across_classes(seen: Seen, verdict: Verdict) -> None:
    """Puts boxes and detections together that no one of their own class claims."""
    truth = np.flatnonzero((verdict.truth == NONE) & ~seen.ignored)
    found = np.flatnonzero(verdict.found == NONE)
    if not len(truth) or not len(found):
        return
    overlap = np.asarray(
        iou(_xywh(seen.boxes[found]), _xywh(seen.truth[truth]), np.zeros(len(truth), np.uint8))
    )
    for place in np.argsort(-overlap, axis=None, kind='stable'):
        row, column = divmod(int(place), len(truth))
        d, t = found[row], truth[column]
        if overlap[row, column] < OVERLAP:
            return
        if verdict.found[d] == NONE and verdict.truth[t] == NONE:
            verdict.found[d], verdict.truth[t] = t, d


def _xywh(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)

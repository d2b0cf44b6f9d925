"""Images of a validation set: what is in them beside what was found."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator, Sequence

import cv2
import mmcv
import numpy as np
from markupsafe import Markup

from mmdet_gdino_lora.report.detect import Seen
from mmdet_gdino_lora.report.measure import LEFT_OUT, NONE, Measurement, Verdict, quality, right

#: Units of a picture's width, in which text has the size of the page's; and pixels of its longest
#: side.
WIDTH, PIXELS = 400, 720
#: Width of a label's letter, about.
LETTER = 7.5
_BOX = Markup(
    '<rect x="{0:.1f}" y="{1:.1f}" width="{2:.1f}" height="{3:.1f}" class="under"/>'
    '<rect x="{0:.1f}" y="{1:.1f}" width="{2:.1f}" height="{3:.1f}" class="{4}"/>'
)
_LABEL = Markup('<text x="{:.1f}" y="{:.1f}">{}</text>')
_IMAGE = Markup('<image id="{}" width="{}" height="{:.1f}" href="data:image/jpeg;base64,{}"/>')
_AGAIN = Markup('<use href="#{}"/>')
_SVG = Markup('<svg viewBox="0 0 {} {:.1f}" role="img" aria-label="{}" class="photo">{}</svg>')


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image of the page.

    Attributes:
        name: Of its file.
        f1: Over all its classes.
        truth: SVG of the image with what is in it.
        found: SVG of the image with what was found.
        told: The same in words.
    """

    name: str
    f1: float
    truth: Markup
    found: Markup
    told: tuple[str, str]


def best_and_worst(
    measurement: Measurement, verdicts: Sequence[Verdict], most: int
) -> tuple[list[Picture], list[Picture]]:
    """Draws the images that went best and worst.

    Args:
        measurement: Of the validation set.
        verdicts: Its own.
        most: How many of each; no image is in both.

    Returns:
        The best ones, the best first; and the worst ones, the worst first.
    """
    seen = measurement.seen
    order = sorted(range(len(seen)), key=lambda i: quality(seen[i], verdicts[i]), reverse=True)
    split = min(most, (len(order) + 1) // 2)
    best, worst = order[:split], order[split:][::-1][:most]
    drawn = {i: _picture(seen[i], verdicts[i], measurement.names, i) for i in [*best, *worst]}
    return [drawn[i] for i in best], [drawn[i] for i in worst]


def _picture(seen: Seen, verdict: Verdict, names: Sequence[str], number: int) -> Picture:
    image = mmcv.imread(seen.path)
    height = WIDTH * image.shape[0] / image.shape[1]
    shrunk = min(1.0, PIXELS / max(image.shape[:2]))
    image = cv2.resize(image, None, fx=shrunk, fy=shrunk, interpolation=cv2.INTER_AREA)
    _, jpeg = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 82])
    name = f'image-{number}'
    content = _IMAGE.format(name, WIDTH, height, base64.b64encode(jpeg.tobytes()).decode())
    scale = WIDTH / seen.size[0]
    told: list[str] = []
    drawn: list[Markup] = []
    for inside, boxes in (
        (content, list(_true_boxes(seen, verdict, names))),
        (_AGAIN.format(name), list(_found_boxes(seen, verdict, names))),
    ):
        words = ', '.join(label for _, label, _ in boxes) or 'nothing'
        parts = [inside, *(_box(corners * scale, *what) for corners, *what in boxes)]
        kind = 'Found' if drawn else 'Truth'
        drawn.append(_SVG.format(WIDTH, height, f'{kind}: {words}', Markup('').join(parts)))
        told.append(words)
    file = seen.path.rpartition('/')[2]
    return Picture(file, quality(seen, verdict)[0], drawn[0], drawn[1], (told[0], told[1]))


def _true_boxes(
    seen: Seen, verdict: Verdict, names: Sequence[str]
) -> Iterator[tuple[np.ndarray, str, str]]:
    for corners, label, ignored, detection in zip(
        seen.truth, seen.labels, seen.ignored, verdict.truth
    ):
        word = ''
        if ignored:
            word = ' (not counted)'
        elif detection == NONE:
            word = ' (missed)'
        elif seen.found[detection] != label:
            word = f' (taken for {names[seen.found[detection]]})'
        yield corners, f'{names[label]}{word}', 'truth'


def _found_boxes(
    seen: Seen, verdict: Verdict, names: Sequence[str]
) -> Iterator[tuple[np.ndarray, str, str]]:
    hits = right(seen, verdict)
    for place in np.argsort(-seen.scores, kind='stable'):
        if verdict.found[place] != LEFT_OUT:
            label = f'{names[seen.found[place]]} {seen.scores[place]:.2f}'
            kind = 'right' if hits[place] else 'wrong'
            yield seen.boxes[place], label if hits[place] else f'{label} (wrong)', kind


def _box(corners: np.ndarray, label: str, kind: str) -> Markup:
    x1, y1, x2, y2 = corners.tolist()
    # Above the box where there is room, and inside the image, as far as its letters let one guess.
    y = y1 - 4 if y1 > 16 else y1 + 13
    x = max(2.0, min(x1 + 2, WIDTH - LETTER * len(label)))
    return _BOX.format(x1, y1, x2 - x1, y2 - y1, kind) + _LABEL.format(x, y, label)

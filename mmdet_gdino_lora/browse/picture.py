"""Draws a view: the image with its boxes, and below it the caption, token by token."""

from __future__ import annotations

import colorsys
import dataclasses
from collections.abc import Iterator, Sequence
from functools import lru_cache

import matplotlib.font_manager
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmdet_gdino_lora.browse.views import Token, View

Colour = tuple[int, int, int]
Area = tuple[int, int, int, int]
INK, PAPER, SOFT = (20, 20, 20), (255, 255, 255), (110, 110, 110)
#: Least width of a picture, pixels, below which words have no room beside each other.
WIDTH = 640
SIZE, SMALL, PAD, GAP = 18, 13, 5, 4
#: Height of a row of tokens: the token, and below it the numbers of its classes.
_TOKEN, _ROW = SIZE + 2 * PAD, SIZE + 2 * PAD + SMALL + 3 * GAP


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where a token stands.

    Attributes:
        token: The token.
        x: Left edge, pixels.
        y: Upper edge.
        width: Of the token with its numbers.
    """

    token: Token
    x: int
    y: int
    width: int


def draw(view: View) -> Image.Image:
    """Draws a view.

    Args:
        view: See :class:`~.views.View`.

    Returns:
        The picture, RGB.
    """
    factor = max(1, -(-WIDTH // view.image.shape[1]))  # whole, so that pixels stay pixels
    height, width = (size * factor for size in view.image.shape[:2])
    rows = [list(laid_out(caption, width)) for caption in view.captions]
    below = [max((cell.y for cell in cells), default=0) + _ROW + GAP for cells in rows]
    picture = Image.new('RGB', (width, height + GAP + sum(below)), PAPER)
    image = Image.fromarray(view.image)
    picture.paste(image.resize((width, height), Image.Resampling.NEAREST))
    pencil = ImageDraw.Draw(picture)
    boxes = (view.boxes * factor).round().astype(int).tolist()
    for box, label in zip(boxes, view.labels.tolist()):
        _draw_box(pencil, box, label)
    taken: list[Area] = []
    for box, label, ignored in zip(boxes, view.labels.tolist(), view.ignored.tolist()):
        words = f'{label} {view.names.get(label, "not in the caption")}' + ' (ignored)' * ignored
        _draw_words(pencil, box, label, words, (width, height), taken)
    top = height + GAP
    for cells, needed in zip(rows, below):
        for cell in cells:
            _draw_cell(pencil, cell, top)
        top += needed
    return picture


def colour(label: int) -> Colour:
    """The colour of a class, on which black can be read.

    Args:
        label: Of the class.

    Returns:
        Red, green and blue, 0 to 255.
    """
    # Turned by the golden angle, hues of neighbours lie far apart however many there are.
    red, green, blue = colorsys.hsv_to_rgb(label * 0.618034 % 1, (0.6, 0.4)[label // 8 % 2], 1)
    return round(red * 255), round(green * 255), round(blue * 255)


def laid_out(caption: Sequence[Token], width: int) -> Iterator[Cell]:
    """Sets a caption in rows.

    Args:
        caption: Its tokens.
        width: Of the picture, pixels.

    Yields:
        Where each token stands, from the first row's upper edge.
    """
    x, y = GAP, 0
    for token in caption:
        wide = max(_length(token.text, SIZE), _length(_numbers(token), SMALL)) + 2 * PAD
        if x > GAP and x + wide > width - GAP:
            x, y = GAP, y + _ROW
        yield Cell(token, x, y, wide)
        x += wide + GAP


def _draw_cell(pencil: ImageDraw.ImageDraw, cell: Cell, top: int) -> None:
    """A token on the colour of its class, or of its classes side by side, above their numbers."""
    x, y, labels = cell.x, cell.y + top, cell.token.labels
    for place, label in enumerate(labels):
        left, right = (x + cell.width * p // len(labels) for p in (place, place + 1))
        pencil.rectangle((left, y, right - 1, y + _TOKEN), fill=colour(label))
    ink = INK if labels else SOFT
    pencil.text((x + PAD, y + PAD), cell.token.text, ink, _font(SIZE))
    pencil.text((x + PAD, y + _TOKEN + GAP), _numbers(cell.token), INK, _font(SMALL))


def _draw_box(pencil: ImageDraw.ImageDraw, box: Sequence[int], label: int) -> None:
    """A box whose lines show on whatever is below."""
    x1, y1, x2, y2 = box
    for inset, line in ((-1, INK), (0, colour(label)), (1, colour(label)), (2, INK)):
        if x2 - x1 > 2 * inset and y2 - y1 > 2 * inset:
            pencil.rectangle((x1 + inset, y1 + inset, x2 - inset, y2 - inset), outline=line)


def _draw_words(
    pencil: ImageDraw.ImageDraw,
    box: Sequence[int],
    label: int,
    words: str,
    size: tuple[int, int],
    taken: list[Area],
) -> None:
    """A box's words on it, where no other box's words are, if there is such a place."""
    x1, y1, _, y2 = box
    wide, high = _length(words, SMALL) + 2 * GAP, SMALL + 2 * GAP
    left = min(max(0, x1), max(0, size[0] - wide))
    wanted = (y1 - high, y2 + 1, y1, y2 - high, y1 + high)
    tops = [min(max(0, top), size[1] - high) for top in wanted]
    places = [(left, top, left + wide, top + high) for top in tops]
    area = next((p for p in places if not any(_overlap(p, other) for other in taken)), places[0])
    taken.append(area)
    pencil.rectangle(area, fill=colour(label))
    pencil.text((area[0] + GAP, area[1] + GAP - 1), words, INK, _font(SMALL))


def _overlap(a: Area, b: Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _numbers(token: Token) -> str:
    return ' '.join(map(str, token.labels))


def _length(text: str, size: int) -> int:
    return int(np.ceil(_font(size).getlength(text)))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # It comes with matplotlib, which mmdet brings, and has letters beyond the English ones.
    return ImageFont.truetype(matplotlib.font_manager.findfont('DejaVu Sans'), size)

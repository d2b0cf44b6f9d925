"""Pictures with boxes and names, for image_demo.py and demo.py."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

#: BGR, well apart from each other; reused when there are more classes.
COLOURS = [(75, 25, 230), (75, 180, 60), (200, 130, 0), (48, 130, 245), (180, 30, 145)]
COLOURS += [(240, 240, 70), (230, 50, 240), (60, 245, 210), (25, 225, 255), (195, 190, 250)]


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], captions: Sequence[str]
) -> np.ndarray:
    """Draws boxes with a caption each.

    Args:
        image: uint8 [H, W, 3] BGR.
        boxes: [N, 4] absolute (x1, y1, x2, y2).
        labels: N class labels, which choose the colours.
        captions: N texts.

    Returns:
        A copy of the image with the boxes.
    """
    picture = image.copy()
    height, width = picture.shape[:2]
    scale = max(0.35, min(height, width) / 1200)
    line = max(1, round(min(height, width) / 400))
    for (x1, y1, x2, y2), label, caption in zip(boxes.round().astype(int), labels, captions):
        colour = COLOURS[label % len(COLOURS)]
        cv2.rectangle(picture, (int(x1), int(y1)), (int(x2), int(y2)), colour, line)
        (w, h), below = cv2.getTextSize(caption, cv2.FONT_HERSHEY_SIMPLEX, scale, 1)
        left = int(np.clip(x1, 0, max(0, width - w)))
        base = int(y1) - below if y1 - h - below >= 0 else int(y1) + h + 1
        cv2.rectangle(picture, (left, base - h - 1), (left + w, base + below), colour, -1)
        ink = (255, 255, 255) if np.dot(colour, (0.114, 0.587, 0.299)) < 140 else (0, 0, 0)
        cv2.putText(
            picture, caption, (left, base), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, 1, cv2.LINE_AA
        )
    return picture

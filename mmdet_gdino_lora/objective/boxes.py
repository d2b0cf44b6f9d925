"""Boxes: formats, and the two distances of the objective (L1 and GIoU)."""

from __future__ import annotations

import torch
from torch import Tensor

#: Smallest union or enclosing area divided by, in units of the image's area (about 1e-6 pixels
#: in a megapixel image, mmdet's ``eps``). Only two boxes without any area come near it.
AREA_EPS = 1e-12


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(cx, cy, w, h) to (x1, y1, x2, y2); shape [..., 4], any unit."""
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """(x1, y1, x2, y2) to (cx, cy, w, h); shape [..., 4], any unit."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack(((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1), dim=-1)


def l1_and_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The two distances between boxes, which share most of their arithmetic.

    L1 is the sum of the absolute differences of cx, cy, w, h (DETR, sec. 3.1). Generalised IoU is
    ``IoU - (enclosing - union) / enclosing``, in -1..1 (Rezatofighi et al., 2019).

    Corners are not needed. Two intervals with mean length ``w``, centres ``dx`` and lengths ``dw``
    apart overlap by ``w - max(dx, dw / 2)`` (negative: the gap between them) and together span
    ``w + max(dx, dw / 2)``: the first argument of the maximum is that of staggered intervals, the
    second that of one inside the other. For small boxes this is more exact in float32 than
    differences of corners, which cancel.

    Args:
        a: [4, ...], the coordinates (cx, cy, w, h) first, in 0..1.
        b: [4, ...], of a shape that broadcasts against that of ``a``.

    Returns:
        L1 and GIoU, [...]. Boxes without area take mmdet's limits: a GIoU of 0 for two equal
        points, of -1 for two apart.
    """
    apart = (a - b).abs()
    offset = torch.maximum(apart[:2], apart[2:] / 2)
    size = (a[2:] + b[2:]) / 2
    inner = (size - offset).clamp(min=0)
    outer = size + offset
    inter = inner[0] * inner[1]
    union = (a[2] * a[3] + b[2] * b[3] - inter).clamp(min=AREA_EPS)
    enclosing = (outer[0] * outer[1]).clamp(min=AREA_EPS)
    return apart.sum(0), inter / union + union / enclosing - 1

"""Boxes: formats, and the two distances of the objective (L1 and GIoU)."""

from __future__ import annotations

from typing import NamedTuple

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


class BoxDistance(NamedTuple):
    """Two sets of boxes compared: everything that L1 and GIoU need, computed once for both.

    All fields broadcast against each other. ``dx``, ``dy``, ``dw``, ``dh`` are the absolute
    differences of the coordinates, ``w`` and ``h`` the mean widths and heights, ``areas`` the sum
    of the two areas.
    """

    dx: Tensor
    dy: Tensor
    dw: Tensor
    dh: Tensor
    w: Tensor
    h: Tensor
    areas: Tensor

    @classmethod
    def between(cls, a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> BoxDistance:
        """Compare boxes given as four coordinate tensors (cx, cy, w, h) that broadcast."""
        (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
        return cls(
            dx=(ax - bx).abs(),
            dy=(ay - by).abs(),
            dw=(aw - bw).abs(),
            dh=(ah - bh).abs(),
            w=(aw + bw) / 2,
            h=(ah + bh) / 2,
            areas=aw * ah + bw * bh,
        )

    def l1(self) -> Tensor:
        """Sum of the absolute differences of cx, cy, w, h (DETR, sec. 3.1)."""
        return self.dx + self.dy + self.dw + self.dh

    def giou(self) -> Tensor:
        """Generalised IoU in -1..1: IoU - (enclosing - union) / enclosing (Rezatofighi et al.).

        Corners are not needed. Two intervals with mean length ``w``, centres ``dx`` and lengths
        ``dw`` apart overlap by ``w - max(dx, dw / 2)`` (negative: the gap between them) and
        together span ``w + max(dx, dw / 2)``: the first argument of the maximum is that of
        staggered intervals, the second that of one inside the other. For small boxes this is
        more exact in float32 than differences of corners, which cancel.

        Boxes without area take mmdet's limits: 0 for two equal points, -1 for two apart.
        """
        offset_x = torch.maximum(self.dx, self.dw / 2)
        offset_y = torch.maximum(self.dy, self.dh / 2)
        inter = (self.w - offset_x).clamp(min=0) * (self.h - offset_y).clamp(min=0)
        union = (self.areas - inter).clamp(min=AREA_EPS)
        enclosing = ((self.w + offset_x) * (self.h + offset_y)).clamp(min=AREA_EPS)
        return inter / union + union / enclosing - 1

"""Boxes: formats, and the two distances of the objective (L1 and GIoU)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    meeting = _Meeting.of(a, b)
    return meeting.l1(), meeting.giou()


class L1AndGIoU(torch.autograd.Function):
    """This is `l1_and_giou` for fixed ``b``, its derivative by ``a`` computed in the same pass.

    Autograd would take twice as many operations on the way back. Both boxes have the same shape.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Compare boxes [4, ...] as `l1_and_giou` does."""
        by_a, by_b = ctx.needs_input_grad
        if by_b:
            raise NotImplementedError('the boxes compared with must not need a gradient')
        meeting = _Meeting.of(a, b)
        if by_a:
            ctx.save_for_backward(*_slopes(a, meeting))
        return meeting.l1(), meeting.giou()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_l1: Tensor, grad_giou: Tensor) -> tuple[Tensor, None]:
        """Give the gradient of ``a``."""
        of_l1, of_giou = ctx.saved_tensors
        return torch.addcmul(grad_l1 * of_l1, grad_giou, of_giou), None


class _Meeting(NamedTuple):
    """How two boxes lie, in the words of `l1_and_giou`.

    Attributes:
        way: [4, ...], differences.
        apart: [4, ...], without their sign.
        half: [2, ...], half of the lengths' differences.
        gap: [2, ...], the overlap in x and in y, negative between boxes apart.
        inner: [2, ...], the same, 0 between boxes apart.
        outer: [2, ...], the span in x and in y.
        union: [...], an area.
        enclosing: [...], an area.
        iou: [...].
        filled: [...], union / enclosing.
    """

    way: Tensor
    apart: Tensor
    half: Tensor
    gap: Tensor
    inner: Tensor
    outer: Tensor
    union: Tensor
    enclosing: Tensor
    iou: Tensor
    filled: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> _Meeting:
        """Compare boxes [4, ...]."""
        way = a - b
        apart = way.abs()
        half = apart[2:] / 2
        offset = torch.maximum(apart[:2], half)
        size = (a[2:] + b[2:]) / 2
        gap, outer = size - offset, size + offset
        inner = gap.clamp(min=0)
        inter = inner[0] * inner[1]
        union = (a[2] * a[3] + b[2] * b[3] - inter).clamp(min=AREA_EPS)
        enclosing = (outer[0] * outer[1]).clamp(min=AREA_EPS)
        ratios = inter / union, union / enclosing
        return cls(way, apart, half, gap, inner, outer, union, enclosing, *ratios)

    def l1(self) -> Tensor:
        """L1 distance [...]."""
        return self.apart.sum(0)

    def giou(self) -> Tensor:
        """Generalised IoU [...]."""
        return self.iou + self.filled - 1


def _slopes(a: Tensor, meeting: _Meeting) -> tuple[Tensor, Tensor]:
    """Differentiate L1 and GIoU by ``a``, both [4, ...].

    With the areas I of the intersection, U of the union, E of what encloses both and A of ``a``,
    of which dU = dA - dI, GIoU changes by

        dI * (1 / U - c) + dA * c - dE * U / E^2,    c = 1 / E - I / U^2

    and an area by d(x * y) = y * dx + x * dy. A clamp and a maximum have autograd's derivatives:
    none where a clamp has cut, half for each of two equal arguments of a maximum.
    """
    way, apart, half, gap, inner, outer, union, enclosing, iou, filled = meeting
    above = torch.ops.aten.threshold_backward
    across, across_outer, across_box = torch.stack((inner, outer, a[2:])).flip(1)
    by_area = above(torch.addcdiv(enclosing.reciprocal(), iou, union, value=-1), union, AREA_EPS)
    by_outer = above(filled / enclosing, enclosing, AREA_EPS) * across_outer
    by_gap = (union.reciprocal() - by_area) * across
    by_gap.masked_fill_(gap < 0, 0)
    # Both lengths hold the mean length, half of which is of a; the offset shortens the inner one.
    by_offset = by_gap + by_outer
    staggered = by_offset * (apart[:2] - half).sgn()
    sign = way.sgn()
    slope = torch.cat((by_offset + staggered, (by_offset - staggered) / 2)).mul_(sign).mul_(-0.5)
    slope[2:].add_(by_gap - by_outer, alpha=0.5).addcmul_(by_area, across_box)
    return sign, slope

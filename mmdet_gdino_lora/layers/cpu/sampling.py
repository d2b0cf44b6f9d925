"""On the CPU multi-scale deformable sampling is computed as sparse products."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdet_gdino_lora.layers.levels import Shapes

warnings.filterwarnings('ignore', message='Sparse CSR tensor support is in beta')


def sample_levels(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
    """Sample bilinearly and add up, as mmcv's ``multi_scale_deformable_attn_pytorch`` does.

    Deformable DETR, eq. 3. mmcv runs ``grid_sample`` per level on copies of the features and keeps
    all samples, [B, Q, heads, levels * points, D], for the backward pass. Seen as a matrix, the
    operation has ``4 * levels * points`` entries per query and head, and the features are its right
    side: one sparse product forward, two backward, and nothing kept but the arguments.

    Args:
        value: [B, S, heads, D] features of all levels; the sum of the levels' sizes is S.
        shapes: (height, width) of each level.
        locations: [B, Q, heads, levels, points, 2] as (x, y) in 0..1; outside lie zeros.
        weights: [B, Q, heads, levels, points].

    Returns:
        [B, Q, heads * D] in the dtype of ``value``.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    out = _SampleLevels.apply(
        value.to(dtype).contiguous(), locations.to(dtype), weights.to(dtype), shapes
    )
    return out.to(value.dtype)


class _Points(NamedTuple):
    """These are the sampling points of all N queries and heads; each lies between four positions.

    The corners are ordered (top, left), (top, right), (bottom, left), (bottom, right). N is the
    last dimension, so that whatever differs per level is one number for a long row.

    Attributes:
        rows: int32 [N, 4 * points of all levels], the corners' rows in the flat features; any row
            for a corner outside its level.
        x, y: [points, N], the way from the first corner to the point, 0..1.
        columns_seen, lines_seen: bool [2, points, N], whether left and right, top and bottom lie
            inside the level.
    """

    rows: Tensor
    x: Tensor
    y: Tensor
    columns_seen: Tensor
    lines_seen: Tensor

    def shares(self) -> Tensor:
        """What each corner (y, x) adds to its point, zero outside the level: [2, 2, points, N]."""
        across = torch.stack((1 - self.x, self.x)).mul_(self.columns_seen)
        down = torch.stack((1 - self.y, self.y)).mul_(self.lines_seen)
        return down[:, None] * across


def _points(shapes: Shapes, locations: Tensor, num_rows: int) -> _Points:
    batch, queries, heads, levels, points, _ = locations.shape

    def per_point(numbers: list) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32).repeat_interleave(points)[:, None]

    heights = per_point([height for height, _ in shapes])
    widths = per_point([width for _, width in shapes])
    areas = [height * width for height, width in shapes]
    starts = per_point([sum(areas[:level]) for level in range(levels)])

    # Rounded like mmcv: to 2x - 1 for grid_sample, and back inside it.
    place = locations.reshape(-1, levels * points, 2).permute(2, 1, 0).contiguous()
    place = place.mul_(2).sub_(1).add_(1).mul_(torch.stack((widths, heights)) / 2).sub_(0.5)
    floor = place.floor()
    first = floor.to(torch.int32)
    x, y = place.sub_(floor)
    columns, lines = first

    # Of a position's features: the head varies fastest, then the position, then the image.
    image = torch.arange(batch, dtype=torch.int32) * (num_rows // batch)
    offset = image[:, None, None] + torch.arange(heads, dtype=torch.int32)
    offset = offset.expand(batch, queries, heads).reshape(-1)
    top_left = (lines * widths).add_(columns).add_(starts).mul_(heads).add_(offset)
    right, below = torch.full_like(widths, heads), widths * heads
    rows = torch.stack((top_left, top_left + right, top_left + below, top_left + (below + right)))
    rows = rows.clamp_(0, num_rows - 1).flatten(0, 1).t().contiguous()

    def seen(index: Tensor, size: Tensor) -> Tensor:
        return torch.stack(((index >= 0) & (index < size), (index >= -1) & (index < size - 1)))

    return _Points(rows, x, y, seen(columns, widths), seen(lines, heights))


class _SampleLevels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes
    ) -> Tensor:
        ctx.save_for_backward(value, locations, weights)
        ctx.shapes = shapes
        features = value.view(-1, value.shape[-1])
        points = _points(shapes, locations, len(features))
        entries = points.shares().mul_(_by_point(weights))
        out = F.embedding_bag(
            points.rows, features, per_sample_weights=_by_query(entries), mode='sum'
        )
        return out.view(*locations.shape[:2], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, locations, weights = ctx.saved_tensors
        features = value.view(-1, value.shape[-1])
        grad = grad.reshape(-1, value.shape[-1])
        points = _points(ctx.shapes, locations, len(features))
        shares, point_weights = points.shares(), _by_point(weights)
        grad_value = grad_locations = grad_weights = None
        if any(ctx.needs_input_grad[1:3]):
            # What each corner would add: its features times the output's gradient.
            corners = _dots(points.rows, grad, features).t().contiguous().view_as(shares)
            grad_weights = (shares * corners).sum((0, 1)).t().reshape(weights.shape)
            corners.mul_(points.lines_seen[:, None]).mul_(points.columns_seen)
            (top_left, top_right), (bottom_left, bottom_right) = corners
            slopes = torch.stack(
                (
                    torch.lerp(top_right - top_left, bottom_right - bottom_left, points.y),
                    torch.lerp(bottom_left - top_left, bottom_right - top_right, points.x),
                )
            ).mul_(point_weights)
            sizes = slopes.new_tensor([(width, height) for height, width in ctx.shapes])
            grad_locations = slopes.permute(2, 1, 0).reshape(locations.shape).mul_(sizes[:, None])
        if ctx.needs_input_grad[0]:
            entries = _by_query(shares.mul_(point_weights))
            grad_value = _transposed_product(points.rows, entries, grad, len(features))
            grad_value = grad_value.view_as(value)
        return grad_value, grad_locations, grad_weights, None


def _by_point(weights: Tensor) -> Tensor:
    """Turn [B, Q, heads, levels, points] into [points of all levels, N]."""
    return weights.reshape(-1, weights.shape[-2] * weights.shape[-1]).t().contiguous()


def _by_query(entries: Tensor) -> Tensor:
    """Turn [2, 2, points, N] into [N, 4 * points], the order of `_Points.rows`."""
    return entries.flatten(0, 2).t().contiguous()


def _transposed_product(rows: Tensor, shares: Tensor, grad: Tensor, num_rows: int) -> Tensor:
    """Multiply the transposed sampling matrix with ``grad``: [num_rows, D].

    In scipy: torch has no transposed sparse product that would not sort all entries first.
    """
    starts = _starts(rows)
    matrix = csr_matrix(
        (shares.numpy().ravel(), rows.numpy().ravel(), starts.numpy()), shape=(len(rows), num_rows)
    )
    return torch.from_numpy(matrix.T @ grad.numpy())


def _dots(rows: Tensor, grad: Tensor, features: Tensor) -> Tensor:
    """Compute ``grad[n] @ features[rows[n, i]]`` for every entry: the shape of ``rows``."""
    entries = torch.sparse_csr_tensor(
        _starts(rows),
        rows.flatten(),
        torch.zeros(rows.numel(), dtype=grad.dtype),
        (len(rows), len(features)),
        check_invariants=False,
    )
    dots = torch.sparse.sampled_addmm(entries, grad, features.t(), beta=0.0)
    return dots.values().view(rows.shape)


def _starts(rows: Tensor) -> Tensor:
    return torch.arange(0, rows.numel() + 1, rows.shape[1], dtype=torch.int32)

"""Gradients that are written out, against autograd of the same and of other libraries' formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mmdet.models.layers import inverse_sigmoid
from mmdet.models.losses.iou_loss import giou_loss
from torch import Tensor
from torch.autograd import gradcheck

from mmdet_gdino_lora.layers.refinement import BeforeSigmoid, before_sigmoid
from mmdet_gdino_lora.objective.boxes import L1AndGIoU, cxcywh_to_xyxy, l1_and_giou

EPS = 1e-5


def boxes(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Pairs of boxes [4, 400], as a model's or with edges, centres and corners in common."""
    torch.manual_seed(0)
    if kind == 'on a grid':
        return tuple(torch.randint(1, 5, (2, 4, 400)).to(dtype) / 4)
    a = torch.rand(4, 400, dtype=dtype) * 0.5 + 0.05
    b = a + 0.1 * torch.randn_like(a)
    b[:, :100] = a[:, :100]
    b[2:, 100:200] = a[2:, 100:200]
    return a, b.clamp(min=0.01)


def gradients(compare: Callable, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both distances, and the gradient of a sum of them with other weights for each pair."""
    a = a.clone().requires_grad_()
    l1, giou = compare(a, b)
    weights = torch.linspace(-1, 2, l1.numel(), dtype=a.dtype)
    return l1, giou, torch.autograd.grad((weights * l1 + weights.flip(0) * giou).sum(), a)[0]


def by_mmdet(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same distances from torch's L1 and mmdet's loss."""
    l1 = torch.nn.functional.l1_loss(a, b, reduction='none').sum(0)
    corners = cxcywh_to_xyxy(a.t()), cxcywh_to_xyxy(b.t())
    return l1, 1 - giou_loss(*corners, eps=1e-12, reduction='none')


@pytest.mark.parametrize('kind', ['near', 'on a grid'])
def test_box_gradients_are_autograds(kind: str) -> None:
    a, b = boxes(kind, torch.float64)
    for own, theirs in zip(gradients(L1AndGIoU.apply, a, b), gradients(l1_and_giou, a, b)):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)
    exact = gradients(l1_and_giou, a.float().double(), b.float().double())
    for own, theirs in zip(gradients(L1AndGIoU.apply, a.float(), b.float()), exact):
        scale = theirs.abs().max()
        torch.testing.assert_close(own.double() / scale, theirs / scale, rtol=0, atol=1e-6)


def test_box_gradients_are_mmdets() -> None:
    a, b = (side[:, 200:] for side in boxes('near', torch.float64))
    for own, theirs in zip(gradients(L1AndGIoU.apply, a, b), gradients(by_mmdet, a, b)):
        torch.testing.assert_close(own, theirs, rtol=1e-8, atol=1e-8)
    assert gradcheck(lambda x: L1AndGIoU.apply(x, b[:, :50]), a[:, :50].clone().requires_grad_())


def test_boxes_without_area_have_autograds_gradients() -> None:
    points = torch.tensor([[0.5, 0.5, 0, 0], [0.2, 0.5, 0, 0], [0.5, 0.5, 0.1, 0]]).double().t()
    a, b = points[:, :, None].expand(4, 3, 3).flatten(1), points[:, None].expand(4, 3, 3).flatten(1)
    for own, theirs in zip(gradients(L1AndGIoU.apply, a, b), gradients(l1_and_giou, a, b)):
        assert own.isfinite().all()
        torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize('eps', [1e-3, EPS])
def test_boxes_before_the_sigmoid_are_mmdets(eps: float) -> None:
    edges = torch.tensor([0, eps / 2, eps, 2 * eps, 0.5, 1 - 2 * eps, 1 - eps, 1 - eps / 2, 1])
    x = torch.cat((edges, torch.rand(100))).double().requires_grad_()
    (theirs,) = torch.autograd.grad((inverse_sigmoid(x, eps) * x.detach().cos()).sum(), x)
    (own,) = torch.autograd.grad((BeforeSigmoid.apply(x, eps) * x.detach().cos()).sum(), x)
    torch.testing.assert_close(own, theirs)
    assert torch.equal(BeforeSigmoid.apply(x, eps), inverse_sigmoid(x, eps))
    assert torch.equal(before_sigmoid(x, eps), inverse_sigmoid(x, eps))


def test_second_derivatives_are_refused() -> None:
    a, b = boxes('near', torch.float64)
    x = a.clone().requires_grad_()
    for y in (*L1AndGIoU.apply(x, b), BeforeSigmoid.apply(x, EPS)):
        (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='once_differentiable'):
            first.sum().backward()
    with pytest.raises(NotImplementedError, match='must not need a gradient'):
        L1AndGIoU.apply(a, b.clone().requires_grad_())

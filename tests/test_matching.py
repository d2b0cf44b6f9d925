"""The matcher and its costs, against scipy on slow costs, and in mmdet's own assigner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmdet.models.task_modules.assigners import HungarianAssigner
from mmdet.models.task_modules.assigners.match_cost import BaseMatchCost
from mmdet.registry import TASK_UTILS
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment

from mmdet_gdino_lora.objective import (
    BatchedCost,
    BoxGIoUCost,
    BoxL1Cost,
    HungarianMatcher,
    TokenFocalCost,
)
from mmdet_gdino_lora.objective import matcher as matcher_module
from mmdet_gdino_lora.objective.boxes import cxcywh_to_xyxy, l1_and_giou, xyxy_to_cxcywh
from mmdet_gdino_lora.objective.criterion import GroundingDINOCriterion
from mmdet_gdino_lora.objective.groups import decoder_group
from mmdet_gdino_lora.objective.targets import Targets
from tests.objective import Reference, corners, draw, giou

SETTINGS = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
HEIGHT, WIDTH = 480, 640
STOCK = [
    dict(type='BinaryFocalLossCost', weight=2.0),
    dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
    dict(type='IoUCost', iou_mode='giou', weight=2.0),
]
OURS = [
    dict(type='TokenFocalCost', weight=1.0),
    dict(type='BoxL1Cost', weight=5.0),
    dict(type='BoxGIoUCost', weight=2.0),
]


def cost_matrices(matcher: HungarianMatcher, outputs: dict, targets: list[dict]) -> list:
    """Per image [N, L, Q], of all decoder layers, as the criterion asks the matcher for them."""
    brought = Targets.of(outputs, targets)
    costs = matcher.cost_matrix(decoder_group(outputs, brought), brought)
    return list(costs.transpose(0, 1).split(brought.counts))


def instances(
    outputs: dict, targets: list[dict], image: int
) -> tuple[InstanceData, InstanceData, dict]:
    """One image of the last layer in mmdet's form."""
    size = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    mask, target = outputs['text_token_mask'][image], targets[image]
    predicted = InstanceData(
        scores=outputs['pred_logits'][image].detach(),
        bboxes=cxcywh_to_xyxy(outputs['pred_boxes'][image].detach()) * size,
    )
    truth = InstanceData(
        labels=target['labels'],
        bboxes=cxcywh_to_xyxy(target['boxes']) * size,
        positive_maps=target['token_labels'],
        text_token_mask=mask.expand(len(target['labels']), -1),
    )
    return predicted, truth, dict(img_shape=(HEIGHT, WIDTH))


@SETTINGS
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    num_queries=st.integers(1, 70),
    num_tokens=st.integers(1, 40),
    degenerate=st.booleans(),
)
def test_matches_cost_the_least(seed, sizes, num_queries, num_tokens, degenerate):
    outputs, targets = draw(seed, sizes, num_queries, num_tokens, degenerate=degenerate)
    indices = HungarianMatcher()(outputs, targets)
    for image, (query, target) in enumerate(indices):
        valid = outputs['text_token_mask'][image]
        assert len(query) == len(target) == min(num_queries, sizes[image])
        assert len(set(query.tolist())) == len(set(target.tolist())) == len(query)
        if not len(query):
            continue
        assert (query.diff() > 0).all()
        cost = (
            Reference()
            .cost(
                outputs['pred_logits'][image].detach().double()[:, valid],
                outputs['pred_boxes'][image].detach().double(),
                targets[image]['token_labels'][:, valid].double(),
                targets[image]['boxes'].double(),
            )
            .numpy()
        )
        best = cost[linear_sum_assignment(cost)].sum()
        assert cost[query, target].sum() == pytest.approx(best, rel=1e-6, abs=1e-5)


def test_matches_are_not_the_first_queries():
    outputs, targets = draw(0, (5, 5), 60)
    indices = HungarianMatcher()(outputs, targets)
    assert any(query.tolist() != list(range(5)) for query, _ in indices)


def test_a_target_predicted_exactly_gets_its_query():
    outputs, targets = draw(1, (4, 2), 30)
    wanted = [torch.tensor([7, 21, 3, 11]), torch.tensor([29, 0])]
    with torch.no_grad():
        for image, (target, query) in enumerate(zip(targets, wanted)):
            outputs['pred_boxes'][image, query] = target['boxes']
            outputs['pred_logits'][image, query] = target['token_labels'] * 10 - 5
    for (query, target), expected in zip(HungarianMatcher()(outputs, targets), wanted):
        assert torch.equal(expected[target], query)


def test_rows_labelled_minus_one_are_not_matched():
    outputs, targets = draw(2, (4, 2), 30)
    targets[0]['labels'][1] = -1
    query, target = HungarianMatcher()(outputs, targets)[0]
    assert len(query) == 3 and sorted(target.tolist()) == [0, 2, 3]


def test_threads_change_nothing(monkeypatch):
    outputs, targets = draw(3, (9, 0, 70), 90)
    with_threads = HungarianMatcher()(outputs, targets)
    monkeypatch.setattr(matcher_module, 'THREADED_FROM', 1000)
    for mine, other in zip(with_threads, HungarianMatcher()(outputs, targets)):
        assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])


@pytest.mark.parametrize('block', [1, 1 << 30])
def test_block_size_changes_nothing(monkeypatch, block):
    outputs, targets = draw(4, (9, 0, 5), 12)
    expected = cost_matrices(HungarianMatcher(), outputs, targets)
    monkeypatch.setattr('mmdet_gdino_lora.objective.cpu.BLOCK', block)
    for mine, other in zip(cost_matrices(HungarianMatcher(), outputs, targets), expected):
        assert mine.shape == (len(mine), 3, 12)
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('image', [0, 1, 2])
@pytest.mark.parametrize('costs', [OURS, STOCK], ids=['ours', 'stock'])
def test_same_numbers_in_batch_and_in_mmdets_interface(image, costs):
    outputs, targets = draw(5, (6, 0, 3), 20, degenerate=True)
    matrices = cost_matrices(HungarianMatcher(costs), outputs, targets)
    matrix = matrices[image]
    predicted, truth, meta = instances(outputs, targets, image)
    if not len(truth.labels):
        assert matrix.shape == (0, 3, 20)
        return
    one_by_one = sum(
        TASK_UTILS.build(cost)(pred_instances=predicted, gt_instances=truth, img_meta=meta)
        for cost in costs
    )
    torch.testing.assert_close(matrix[:, -1].t(), one_by_one, rtol=1e-5, atol=2e-5)


def test_our_costs_work_in_mmdets_assigner():
    outputs, targets = draw(6, (6, 0, 3), 20)
    assigner = HungarianAssigner(match_costs=OURS)
    for image, (query, target) in enumerate(HungarianMatcher(OURS)(outputs, targets)):
        predicted, truth, meta = instances(outputs, targets, image)
        result = assigner.assign(predicted, truth, img_meta=meta)
        assigned = torch.zeros(20, dtype=torch.long)
        assigned[query] = target + 1
        assert torch.equal(result.gt_inds, assigned)


def test_costs_read_only_what_they_need_in_mmdets_interface():
    outputs, targets = draw(7, (6, 0, 3), 20)
    predicted, truth, meta = instances(outputs, targets, 0)
    boxes_only = InstanceData(bboxes=predicted.bboxes)
    for cost in (BoxL1Cost(), BoxGIoUCost()):
        assert cost(boxes_only, InstanceData(bboxes=truth.bboxes), meta).shape == (20, 6)
    scores_only = InstanceData(scores=predicted.scores)
    spans = InstanceData(positive_maps=truth.positive_maps, text_token_mask=truth.text_token_mask)
    assert TokenFocalCost()(scores_only, spans).shape == (20, 6)


def test_mmdets_costs_become_batched_ones():
    focal, l1, giou_cost = HungarianMatcher(STOCK).costs
    assert isinstance(focal, TokenFocalCost) and focal.weight == 2 and focal.background
    assert isinstance(l1, BoxL1Cost) and l1.weight == 5
    assert isinstance(giou_cost, BoxGIoUCost) and giou_cost.weight == 2


def test_mmdets_other_costs_are_called_as_they_are():
    costs = HungarianMatcher(
        [dict(type='IoUCost', iou_mode='iou'), dict(type='BBoxL1Cost', box_format='xyxy')]
    ).costs
    assert not any(isinstance(cost, BatchedCost) for cost in costs)


class CentreCost(BaseMatchCost):
    """A user's own: distance of the centres in pixels, and which image it was asked about."""

    def __init__(self) -> None:
        super().__init__(weight=0.01)
        self.shapes: list = []

    def __call__(self, pred_instances, gt_instances, img_meta=None, **kwargs):
        self.shapes.append(img_meta['img_shape'])
        assert len(gt_instances.labels) == len(gt_instances.positive_maps)
        assert pred_instances.scores.shape[1] == gt_instances.text_token_mask.shape[1]
        a, b = pred_instances.bboxes, gt_instances.bboxes
        return self.weight * torch.cdist((a[:, :2] + a[:, 2:]) / 2, (b[:, :2] + b[:, 2:]) / 2)


def test_a_users_own_cost_works_in_the_criterion():
    outputs, targets = draw(8, (6, 0, 3), 20)
    for target in targets:
        target['img_meta'] = dict(img_shape=(HEIGHT, WIDTH))
    own = CentreCost()
    criterion = GroundingDINOCriterion(4, 3, match_costs=[BoxL1Cost(5.0), own])
    losses = criterion(outputs, targets)
    sum(losses.values()).backward()
    assert set(own.shapes) == {(HEIGHT, WIDTH)}
    query, target = criterion.matcher(outputs, targets)[0]
    a, b = outputs['pred_boxes'][0].detach(), targets[0]['boxes']
    pixels = torch.tensor([WIDTH, HEIGHT])
    cost = 5 * torch.cdist(a, b, p=1) + 0.01 * torch.cdist(a[:, :2] * pixels, b[:, :2] * pixels)
    expected = linear_sum_assignment(cost)
    assert query.tolist() == expected[0].tolist() and target.tolist() == expected[1].tolist()


def test_costs_that_are_not_finite_name_the_image():
    class Broken(BaseMatchCost):
        def __call__(self, pred_instances, gt_instances, img_meta=None, **kwargs):
            return torch.full((len(pred_instances.bboxes), len(gt_instances.bboxes)), torch.nan)

    outputs, targets = draw(9, (0, 2), 12)
    with pytest.raises(ValueError, match='image 1'):
        GroundingDINOCriterion(4, 3, match_costs=[Broken()])(outputs, targets)


def test_no_costs_and_unknown_options_are_errors():
    with pytest.raises(ValueError, match='match_costs'):
        HungarianMatcher([])
    with pytest.raises(ValueError, match='reduction'):
        TokenFocalCost(reduction='max')


@SETTINGS
@given(seed=st.integers(0, 2**31), scale=st.sampled_from((1.0, 1e-2, 1e-4)))
def test_giou_without_corners_equals_the_definition(seed, scale):
    rng = np.random.default_rng(seed)
    boxes = torch.from_numpy(np.concatenate((rng.random((9, 2)), rng.random((9, 2))), 1)) * scale
    boxes[0, 2] = boxes[1, 3] = 0
    boxes[2, 2:] = 0
    boxes[3] = boxes[2]
    boxes[4, :2] = boxes[5, :2]
    l1, overlap = l1_and_giou(boxes.t()[:, :, None], boxes.t()[:, None, :])
    torch.testing.assert_close(overlap, giou(corners(boxes), corners(boxes)))
    torch.testing.assert_close(l1, torch.cdist(boxes, boxes, p=1))


def test_box_formats_are_inverse():
    boxes = torch.rand(5, 4, dtype=torch.float64)
    torch.testing.assert_close(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes)

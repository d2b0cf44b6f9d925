"""Matching against every assignment there is, and losses under any order of what has none."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmdet_gdino_lora.objective import HungarianMatcher
from mmdet_gdino_lora.objective.criterion import GroundingDINOCriterion
from mmdet_gdino_lora.objective.groups import decoder_group
from mmdet_gdino_lora.objective.targets import Targets
from tests.objective import assert_same, assert_same_gradients, draw, leaves

SEEDS = st.integers(0, 2**31)
SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=3)


def least(costs: torch.Tensor) -> float:
    """The least total cost [N, Q] of giving every target, or every query, one of its own."""
    costs = costs.double().numpy()
    if costs.shape[0] > costs.shape[1]:
        costs = costs.T
    rows = range(len(costs))
    ways = itertools.permutations(range(costs.shape[1]), len(costs))
    return min(sum(costs[row, way[row]] for row in rows) for way in ways)


@settings(max_examples=60)
@given(seed=SEEDS, sizes=SIZES, num_queries=st.integers(1, 5), degenerate=st.booleans())
def test_no_assignment_costs_less(
    seed: int, sizes: list[int], num_queries: int, degenerate: bool
) -> None:
    outputs, targets = draw(seed, sizes, num_queries, degenerate=degenerate, num_layers=1)
    matcher = HungarianMatcher()
    batch = Targets.of(outputs, targets)
    costs = matcher.cost_matrix(decoder_group(outputs, batch), batch)[0].split(batch.counts)
    for of_image, (query, target) in zip(costs, matcher(outputs, targets)):
        assert len(query) == len(target) == min(of_image.shape)
        assert len(set(query.tolist())) == len(set(target.tolist())) == len(query)
        total = of_image.double()[target, query].sum().item()
        assert np.isclose(total, least(of_image), rtol=1e-5, atol=1e-5)


def losses_and_gradients(outputs: dict, targets: list[dict]) -> tuple[dict, list[torch.Tensor]]:
    criterion = GroundingDINOCriterion(num_classes=4, num_decoder_layers=3)
    losses = criterion(outputs, targets)
    total = sum(criterion.weight_dict[name] * value for name, value in losses.items())
    gradients = torch.autograd.grad(total, leaves(outputs), allow_unused=True)
    return losses, list(gradients)


def moved(outputs: dict, images: torch.Tensor, queries: torch.Tensor) -> dict:
    """The same predictions, of images and queries in another order; new leaves."""
    result = {}
    for name, value in outputs.items():
        if name == 'text_token_mask':
            result[name] = value[images]
        elif isinstance(value, dict):
            result[name] = moved(value, images, queries)
        elif isinstance(value, list):
            result[name] = [moved(part, images, queries) for part in value]
        else:
            result[name] = value.detach()[images][:, queries].requires_grad_()
    return result


@settings(max_examples=60)
@given(seed=SEEDS, sizes=SIZES, order=st.randoms(use_true_random=False))
def test_the_order_of_images_queries_boxes_and_classes_means_nothing(
    seed: int, sizes: list[int], order: object
) -> None:
    outputs, targets = draw(seed, sizes, num_queries=7)

    def shuffled(count: int) -> torch.Tensor:
        return torch.tensor(order.sample(range(count), count), dtype=torch.long)

    images, queries, classes = shuffled(len(sizes)), shuffled(7), shuffled(4)
    other = []
    for image in images.tolist():
        rows = shuffled(sizes[image])
        target = {name: value[rows] for name, value in targets[image].items()}
        # What a class is called by number is nobody's business but the spans'.
        other.append({**target, 'labels': classes[target['labels']]})
    losses, gradients = losses_and_gradients(outputs, targets)
    theirs, moved_gradients = losses_and_gradients(moved(outputs, images, queries), other)
    assert_same(losses, theirs)
    expected = [None if g is None else g[images][:, queries] for g in gradients]
    assert_same_gradients(
        *zip(*((m, e) for m, e in zip(moved_gradients, expected) if e is not None))
    )


@settings(max_examples=40)
@given(seed=SEEDS, sizes=SIZES, order=st.randoms(use_true_random=False))
def test_the_order_of_the_captions_tokens_means_nothing(
    seed: int, sizes: list[int], order: object
) -> None:
    outputs, targets = draw(seed, sizes, num_queries=7, one_caption=True)
    tokens = torch.tensor(order.sample(range(9), 9))

    def columns(part: dict) -> dict:
        result = {}
        for name, value in part.items():
            if isinstance(value, dict):
                result[name] = columns(value)
            elif isinstance(value, list):
                result[name] = [columns(layer) for layer in value]
            elif name == 'pred_boxes':
                result[name] = value.detach().requires_grad_()
            else:
                moved = value.detach()[..., tokens]
                result[name] = moved.requires_grad_(name == 'pred_logits')
        return result

    other = [{**t, 'token_labels': t['token_labels'][:, tokens]} for t in targets]
    losses, _ = losses_and_gradients(outputs, targets)
    theirs, _ = losses_and_gradients(columns(outputs), other)
    assert_same(losses, theirs)

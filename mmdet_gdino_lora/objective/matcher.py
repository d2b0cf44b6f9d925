"""The Hungarian matcher, for all layers and images of a step together."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from mmdet.models.task_modules.assigners.match_cost import (
    BBoxL1Cost,
    BinaryFocalLossCost,
    IoUCost,
)
from mmdet.registry import TASK_UTILS
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mmdet_gdino_lora.objective.assignment import Assignment, to_host
from mmdet_gdino_lora.objective.boxes import cxcywh_to_xyxy
from mmdet_gdino_lora.objective.costs import BatchedCost, BoxGIoUCost, BoxL1Cost, TokenFocalCost
from mmdet_gdino_lora.objective.pairs import QuerySet
from mmdet_gdino_lora.objective.targets import Targets

#: Boxes in one image from which threads pay (scipy releases the interpreter lock).
THREADED_FROM = 64


class HungarianMatcher:
    """One-to-one assignment of least total cost between queries and targets (DETR, sec. 3.1).

    Args:
        match_costs: Configs, or built costs. mmdet's ``BinaryFocalLossCost``, ``BBoxL1Cost``
            ('xywh') and ``IoUCost`` ('giou') are computed in batch, with the same numbers. Any
            other cost with mmdet's interface works, called once per layer and image. Default:
            ``TokenFocalCost`` 1, ``BoxL1Cost`` 5, ``BoxGIoUCost`` 2.
    """

    def __init__(self, match_costs: Sequence | dict | None = None) -> None:
        if match_costs is None:
            match_costs = (TokenFocalCost(), BoxL1Cost(), BoxGIoUCost())
        elif isinstance(match_costs, dict):
            match_costs = [match_costs]
        costs = [TASK_UTILS.build(c) if isinstance(c, dict) else c for c in match_costs]
        if not costs:
            raise ValueError('match_costs is empty: matching needs at least one cost')
        self.costs = [batched(cost) for cost in costs]

    @torch.no_grad()
    def forward(self, outputs: dict, targets: Sequence[dict]) -> list[tuple[Tensor, Tensor]]:
        """Match one layer, in the form of DETR's matcher.

        Args:
            outputs: ``pred_logits`` [B, Q, T], ``pred_boxes`` [B, Q, 4] as (cx, cy, w, h) in
                0..1, ``text_token_mask`` [B, T] bool.
            targets: Per image ``boxes`` [N, 4] and ``token_labels`` [N, T]; ``labels`` [N], where
                given, mark rows to ignore with -1.

        Returns:
            Per image the numbers of the matched queries, ascending, and of their targets: int64,
            min(Q, N) of each.
        """
        targets = [{'labels': t['boxes'].new_zeros(len(t['boxes'])), **t} for t in targets]
        targets = Targets(outputs, targets)
        queries = QuerySet(
            ['layer'],
            [outputs['pred_logits']],
            [outputs['pred_boxes']],
            targets.mask,
            targets.spans,
        )
        keep, spans, *costs = to_host(
            [*targets.for_host(), *self.cost_matrices(queries, targets.per_image)]
        )
        targets.arrived(keep, spans)
        return [
            (torch.from_numpy(query), torch.from_numpy(target))
            for query, target in self.assign(costs, targets.rows)[0]
        ]

    __call__ = forward

    @torch.no_grad()
    def cost_matrices(self, queries: QuerySet, targets: Sequence[dict]) -> list[Tensor]:
        """Total cost of every query with every target of its image.

        Args:
            queries: The predictions.
            targets: Per image ``boxes`` [N, 4]; for costs that aren't batched also ``labels`` [N]
                and, where known, ``img_meta`` (default: ``img_shape`` (1, 1)).

        Returns:
            Per image [N, L, Q] in float32, on the device.
        """
        num_layers, num_queries = len(queries.logits), queries.logits[0].shape[1]
        matrices = []
        for image, target in enumerate(targets):
            blocks = []
            for pairs in queries.pairs(image, target['boxes']) if len(target['boxes']) else ():
                total = None
                for cost in self.costs:
                    if isinstance(cost, BatchedCost):
                        part = cost.pairwise(pairs)
                    else:
                        part = _one_by_one(cost, queries, pairs.layers, image, target)
                    total = part if total is None else total.add_(part)
                blocks.append(total.view(len(total), -1, num_queries))
            if blocks:
                matrices.append(torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0])
            else:
                matrices.append(queries.boxes[0].new_zeros((0, num_layers, num_queries)).float())
        return matrices

    @staticmethod
    def assign(costs: Sequence[np.ndarray], keep: Sequence[np.ndarray]) -> Assignment:
        """Solve the assignments on the host.

        Args:
            costs: Per image [N, L, Q].
            keep: Per image [N] bool; False rows are ignored.

        Returns:
            Per layer and image the matched queries, ascending, and their targets (numbers among
            all N): int64, min(Q, kept N) of each.
        """
        kept = [np.flatnonzero(rows) for rows in keep]
        num_layers = costs[0].shape[1]
        problems = [
            matrix[rows, layer] for layer in range(num_layers) for matrix, rows in zip(costs, kept)
        ]
        try:
            if any(len(rows) >= THREADED_FROM for rows in kept):
                with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                    solved = list(pool.map(linear_sum_assignment, problems))
            else:
                solved = [linear_sum_assignment(problem) for problem in problems]
        except ValueError:
            bad = [i for i, problem in enumerate(problems) if not np.isfinite(problem).all()]
            if not bad:
                raise
            raise ValueError(
                f'image {bad[0] % len(costs)} of the batch has matching costs that are NaN or '
                'infinite: look at its predictions, its target boxes and your own match_costs'
            ) from None
        pairs = []
        for (target, query), rows in zip(solved, kept * num_layers):
            order = np.argsort(query)
            pairs.append((query[order].astype(np.int64), rows[target[order]].astype(np.int64)))
        images = len(costs)
        return [pairs[i * images : (i + 1) * images] for i in range(num_layers)]

    def __repr__(self) -> str:
        return ', '.join(map(repr, self.costs))


def batched(cost):
    """The batched cost with the same numbers as one of mmdet's, or the cost itself.

    A subclass may compute something else, so only the exact classes are translated.
    """
    if type(cost) is BinaryFocalLossCost and not cost.binary_input:
        return TokenFocalCost(cost.weight, cost.alpha, cost.gamma, 'sum', background=True)
    if type(cost) is BBoxL1Cost and cost.box_format == 'xywh':
        return BoxL1Cost(cost.weight)
    if type(cost) is IoUCost and cost.iou_mode == 'giou':
        return BoxGIoUCost(cost.weight)
    return cost


def _one_by_one(cost, queries: QuerySet, layers: slice, image: int, target: dict) -> Tensor:
    """A cost with mmdet's interface, for some layers of one image; [N, l * Q]."""
    img_meta = target.get('img_meta', {'img_shape': (1, 1)})
    height, width = img_meta['img_shape'][:2]
    size = target['boxes'].new_tensor([width, height, width, height])
    spans = queries.spans[image]
    gt_instances = InstanceData(
        bboxes=cxcywh_to_xyxy(target['boxes']) * size,
        labels=target['labels'],
        positive_maps=spans.float(),
        text_token_mask=queries.mask[image].expand(len(spans), -1),
    )
    parts = []
    for logits, boxes in zip(queries.logits[layers], queries.boxes[layers]):
        pred_instances = InstanceData(
            scores=logits[image, :, : spans.shape[1]].float(),
            bboxes=cxcywh_to_xyxy(boxes[image].float()) * size,
        )
        part = cost(pred_instances=pred_instances, gt_instances=gt_instances, img_meta=img_meta)
        parts.append(part.float())
    return torch.cat(parts).t().contiguous()

"""The Hungarian matcher, for all layers and images of a step together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

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

from mmdet_gdino_lora.errors import NonFiniteError
from mmdet_gdino_lora.objective.boxes import cxcywh_to_xyxy
from mmdet_gdino_lora.objective.costs import BatchedCost, BoxGIoUCost, BoxL1Cost, TokenFocalCost
from mmdet_gdino_lora.objective.groups import Group, decoder_group
from mmdet_gdino_lora.objective.host import to_host
from mmdet_gdino_lora.objective.pairs import Pairs
from mmdet_gdino_lora.objective.targets import HostTargets, Targets

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

    def __init__(self, match_costs: Sequence | Mapping | None = None) -> None:
        if match_costs is None:
            match_costs = (TokenFocalCost(), BoxL1Cost(), BoxGIoUCost())
        elif isinstance(match_costs, Mapping):
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
        labelled = [{'labels': t['boxes'].new_zeros(len(t['boxes'])), **t} for t in targets]
        batch = Targets.of(outputs, labelled)
        group = decoder_group({**outputs, 'aux_outputs': None, 'decoder_outputs': None}, batch)
        host = to_host({**batch.for_host(), 'costs': self.cost_matrix(group, batch)})
        costs = host.pop('costs')
        kept = HostTargets(batch.counts, **host).kept
        image, query, target = (index[0] for index in self.assign(costs, kept))
        target = target - np.cumsum([0, *batch.counts])[image]
        here = [image == number for number in range(len(kept))]
        return [(torch.from_numpy(query[at]), torch.from_numpy(target[at])) for at in here]

    __call__ = forward

    @torch.no_grad()
    def cost_matrix(self, group: Group, targets: Targets) -> Tensor:
        """Total cost of every query with every target of its image.

        Args:
            group: The predictions.
            targets: Of the same batch. For costs that aren't batched, its ``per_image`` may hold
                ``img_meta`` (default: ``img_shape`` (1, 1)).

        Returns:
            [L, N, Q] in float32 (float64 for float64 predictions), on the device.
        """
        shape = (len(group.logits), len(targets.boxes), group.num_queries)
        costs = group.boxes.new_empty(shape, dtype=Pairs.cost_dtype(group.boxes))
        for part, pairs in Pairs.of(group, targets):
            total, *others = [
                cost.pairwise(pairs)
                if isinstance(cost, BatchedCost)
                else _one_by_one(cost, pairs, targets)
                for cost in self.costs
            ]
            for other in others:
                total = total.add_(other)
            costs[part] = total
        return costs

    @staticmethod
    def assign(
        costs: np.ndarray, kept: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Solve the assignments on the host.

        Args:
            costs: [L, N, Q].
            kept: Per image, the numbers of its targets that count (among all N).

        Returns:
            Images, their matched queries (ascending) and those queries' targets (among all N),
            int64 [L, M] each; M is the sum over the images of min(Q, kept).
        """
        problems = [matrix[rows] for matrix in costs for rows in kept]
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
            raise NonFiniteError(
                f'image {bad[0] % len(kept)} of the batch has matching costs that are NaN or '
                'infinite: look at its predictions, its target boxes and your own match_costs',
                where=f'matching costs of layer {bad[0] // len(kept)}',
                images=tuple(sorted({number % len(kept) for number in bad})),
            ) from None
        queries, targets = [], []
        for (row, query), rows in zip(solved, [*kept] * len(costs)):
            order = np.argsort(query)
            queries.append(query[order])
            targets.append(rows[row[order]])
        image = np.repeat(np.arange(len(kept)), [len(query) for query in queries[: len(kept)]])
        shape = (len(costs), len(image))
        return (
            np.broadcast_to(image, shape),
            np.concatenate(queries).reshape(shape).astype(np.int64, copy=False),
            np.concatenate(targets).reshape(shape).astype(np.int64, copy=False),
        )

    def __repr__(self) -> str:
        return ', '.join(map(repr, self.costs))


def batched(cost: Any) -> Any:
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


def _one_by_one(cost: Any, pairs: Pairs, targets: Targets) -> Tensor:
    """A cost with mmdet's interface, called for each layer and image; [l, n, Q]."""
    group = pairs.group
    spans = group.spans.split(targets.counts)
    images = range(*pairs.images.indices(len(targets.counts)))
    return torch.cat(
        [_of_image(cost, group, pairs.layers, i, targets.per_image[i], spans[i]) for i in images],
        dim=1,
    )


def _of_image(
    cost: Any, group: Group, layers: slice, image: int, target: dict, spans: Tensor
) -> Tensor:
    img_meta = target.get('img_meta', {'img_shape': (1, 1)})
    height, width = img_meta['img_shape'][:2]
    size = target['boxes'].new_tensor([width, height, width, height])
    gt_instances = InstanceData(
        bboxes=cxcywh_to_xyxy(target['boxes']) * size,
        labels=target['labels'],
        positive_maps=spans.float(),
        text_token_mask=group.mask[image].expand(len(spans), -1),
    )
    parts = []
    for logits, boxes in zip(group.logits[layers, image], group.boxes[layers, image]):
        pred_instances = InstanceData(
            scores=logits[:, : spans.shape[1]].float(),
            bboxes=cxcywh_to_xyxy(boxes.float()) * size,
        )
        part = cost(pred_instances=pred_instances, gt_instances=gt_instances, img_meta=img_meta)
        parts.append(part.float().t())
    return torch.stack(parts)

"""Matching costs: how well a query would do for a target.

Each works in two ways with the same numbers: ``pairwise`` for many layers at once in the
criterion's matcher, and called as mmdet calls a cost in its ``HungarianAssigner``.
"""

from __future__ import annotations

from typing import Any

from mmdet.registry import TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_gdino_lora.objective.focal import span_minus_background
from mmdet_gdino_lora.objective.pairs import Pairs


class BatchedCost:
    """Base of the costs that the matcher computes for all layers of an image together.

    Args:
        weight: Factor on the cost.
    """

    def __init__(self, weight: float = 1.0) -> None:
        self.weight = float(weight)

    def pairwise(self, pairs: Pairs) -> Tensor:
        """Weighted cost [l, n, Q] of each of n targets with Q queries of l layers."""
        raise NotImplementedError

    def __call__(
        self,
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        img_meta: dict | None = None,
        **_: Any,
    ) -> Tensor:
        """mmdet's interface: one layer of one image.

        Args:
            pred_instances: InstanceData with ``scores`` [Q, C] logits and ``bboxes`` [Q, 4],
                absolute (x1, y1, x2, y2).
            gt_instances: InstanceData with ``bboxes`` [N, 4] likewise, ``positive_maps`` [N, C]
                and ``text_token_mask`` [N, C].
            img_meta: With ``img_shape`` (height, width).

        Returns:
            Weighted cost [Q, N] in float32.
        """
        return self.pairwise(Pairs.from_instances(pred_instances, gt_instances, img_meta))[0].t()

    def __repr__(self) -> str:
        return f'{type(self).__name__}(weight={self.weight:g})'


@TASK_UTILS.register_module()
class TokenFocalCost(BatchedCost):
    """Focal cost of a target's span, averaged over its tokens.

    ``mean over span tokens t of span(x_t) - background(x_t)``, the change of the focal loss if
    the query took the target (Grounding DINO, sec. 3.4; as transformers'
    ``GroundingDinoHungarianMatcher``). Formulas in :mod:`mmdet_gdino_lora.objective.focal`.

    Args:
        weight: Factor on the cost. Grounding DINO: 1 (the authors' ``set_cost_class``).
        alpha: Focal weight of span tokens, in 0..1.
        gamma: Focusing exponent.
        reduction: 'mean' or 'sum' over the span's tokens.
        background: Add the focal loss of calling all valid tokens background. The same for all
            targets, it makes the cost the query's whole class loss; with 'sum' this is mmdet's
            ``BinaryFocalLossCost``.
    """

    def __init__(
        self,
        weight: float = 1.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        reduction: str = 'mean',
        background: bool = False,
    ) -> None:
        super().__init__(weight)
        if reduction not in ('mean', 'sum'):
            raise ValueError(f"TokenFocalCost: reduction={reduction!r} is not 'mean' or 'sum'")
        self.alpha = float(alpha)
        self.gamma = float(gamma)
        self.reduction = reduction
        self.background = background

    def pairwise(self, pairs: Pairs) -> Tensor:
        """See the class; [l, n, Q]."""
        change = span_minus_background(pairs.logits(), self.alpha, self.gamma)
        weights = pairs.spans().to(change.dtype) * self.weight
        if self.reduction == 'mean':
            weights /= weights.count_nonzero(1).clamp_(min=1)[:, None]
        cost = pairs.over_spans(change, weights)
        if self.background:
            cost += pairs.background(self.alpha, self.gamma) * self.weight
        return cost


@TASK_UTILS.register_module()
class BoxL1Cost(BatchedCost):
    """L1 distance of (cx, cy, w, h) in units of the image (DETR, sec. 3.1).

    mmdet's ``BBoxL1Cost`` with ``box_format='xywh'``. Grounding DINO's weight is 5.

    Args:
        weight: Factor on the cost.
    """

    def __init__(self, weight: float = 5.0) -> None:
        super().__init__(weight)

    def pairwise(self, pairs: Pairs) -> Tensor:
        """See the class; [l, n, Q]."""
        return pairs.l1() * self.weight


@TASK_UTILS.register_module()
class BoxGIoUCost(BatchedCost):
    """Negative generalised IoU (DETR, sec. 3.1; the constant 1 doesn't change the matching).

    mmdet's ``IoUCost`` with ``iou_mode='giou'``. Grounding DINO's weight is 2.

    Args:
        weight: Factor on the cost.
    """

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__(weight)

    def pairwise(self, pairs: Pairs) -> Tensor:
        """See the class; [l, n, Q]."""
        return pairs.giou() * -self.weight

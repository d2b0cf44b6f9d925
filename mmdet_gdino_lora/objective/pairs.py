"""What a matching cost looks at: queries on one side, the boxes of one image on the other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mmdet_gdino_lora.objective.boxes import BoxDistance, xyxy_to_cxcywh
from mmdet_gdino_lora.objective.focal import CPU_BLOCK, background_focal


@dataclass
class QuerySet:
    """Predictions of several layers that are matched to the same targets.

    The layers share the batch, the number of queries and the tokens.

    Attributes:
        names: What an error calls each layer, L of them.
        logits: Per layer [B, Q, C] token logits. Columns from T on are padding.
        boxes: Per layer [B, Q, 4] as (cx, cy, w, h) in 0..1.
        mask: [B, T] bool, True for valid tokens.
        spans: Per image [N, T] bool: the valid tokens of each target's span.
        background: ``background_focal``'s sums per layer [B, Q], where they are known already,
            under their ``(alpha, gamma)``.
    """

    names: list[str]
    logits: list[Tensor]
    boxes: list[Tensor]
    mask: Tensor
    spans: list[Tensor]
    background: dict[tuple[float, float], list[Tensor]] = field(default_factory=dict)

    def background_sums(self, alpha: float, gamma: float) -> list[Tensor]:
        """Per layer and query [B, Q], the focal loss of calling every valid token background."""
        key = (alpha, gamma)
        if key not in self.background:
            self.background[key] = [
                background_focal(logits, self.mask, alpha, gamma, with_grad=False)[0]
                for logits in self.logits
            ]
        return self.background[key]

    def pairs(self, image: int, target_boxes: Tensor) -> list[Pairs]:
        """The queries of one image, in blocks of layers that fit the CPU's cache together."""
        spans = self.spans[image]
        num_layers, num_queries = len(self.logits), self.logits[0].shape[1]
        per_block = num_layers
        tokens = None
        if spans.device.type == 'cpu':  # elsewhere the host would have to wait for the tokens
            per_block = max(1, CPU_BLOCK // max(1, num_queries * len(spans)))
            tokens = spans.any(dim=0).nonzero().squeeze(1)
            spans = spans[:, tokens]
        return [
            Pairs(self, slice(start, start + per_block), image, tokens, spans, target_boxes)
            for start in range(0, num_layers, per_block)
        ]


class Pairs:
    """Q queries of l layers against the N boxes of one image, for batched costs.

    A cost returns [N, l * Q]. What several costs need is computed once.
    """

    def __init__(
        self,
        queries: QuerySet,
        layers: slice,
        image: int,
        tokens: Tensor | None,
        spans: Tensor,
        target_boxes: Tensor,
    ) -> None:
        self.queries = queries
        self.layers = layers
        self.image = image
        self.tokens = tokens
        self.spans = spans
        self.target_boxes = target_boxes
        self._distance: BoxDistance | None = None

    @classmethod
    def from_instances(cls, pred_instances, gt_instances, img_meta: dict | None) -> Pairs:
        """One layer and image in mmdet's form, as its ``HungarianAssigner`` calls a cost.

        Args:
            pred_instances: InstanceData with ``scores`` [Q, C] (logits) and ``bboxes`` [Q, 4]
                (absolute x1, y1, x2, y2), whichever the cost reads.
            gt_instances: InstanceData with ``bboxes`` [N, 4], ``positive_maps`` [N, C] and
                ``text_token_mask`` [N, C], whichever the cost reads.
            img_meta: Holds ``img_shape`` (height, width); boxes count as normalised without it.
        """
        height, width = (img_meta or {}).get('img_shape', (1, 1))[:2]

        def normalised(bboxes: Tensor) -> Tensor:
            return xyxy_to_cxcywh(bboxes.float() / bboxes.new_tensor([width, height] * 2))

        logits = boxes = mask = spans = target_boxes = None
        if 'scores' in pred_instances:
            logits = pred_instances.scores[None]
            mask = gt_instances.text_token_mask[:1].bool()
            spans = (gt_instances.positive_maps > 0) & mask
        if 'bboxes' in pred_instances:
            boxes = normalised(pred_instances.bboxes)[None]
            target_boxes = normalised(gt_instances.bboxes)
        queries = QuerySet(['layer'], [logits], [boxes], mask, [spans])
        return cls(queries, slice(0, 1), 0, None, spans, target_boxes)

    def logits(self) -> Tensor:
        """Logits [l * Q, U] of the U tokens that ``spans`` [N, U] speaks of."""
        num_tokens = self.queries.mask.shape[1]
        columns = [
            logits[self.image, :, :num_tokens]
            if self.tokens is None
            else logits[self.image].index_select(1, self.tokens)
            for logits in self.queries.logits[self.layers]
        ]
        return torch.cat(columns).detach().to(self.cost_dtype(columns[0]))

    def background(self, alpha: float, gamma: float) -> Tensor:
        """Per query [l * Q], the focal loss of calling every valid token background."""
        sums = self.queries.background_sums(alpha, gamma)[self.layers]
        return torch.cat([layer[self.image] for layer in sums])

    def distance(self) -> BoxDistance:
        """The boxes compared; fields [N, l * Q]."""
        if self._distance is None:
            boxes = torch.cat([boxes[self.image] for boxes in self.queries.boxes[self.layers]])
            boxes = boxes.detach().to(self.cost_dtype(boxes)).t().contiguous()
            targets = self.target_boxes.to(boxes.dtype).t()[:, :, None]
            self._distance = BoxDistance.between(boxes.unbind(), targets.unbind())
        return self._distance

    @staticmethod
    def cost_dtype(tensor: Tensor) -> torch.dtype:
        """float32 for half precision: costs are compared, and bf16 has three digits."""
        return torch.float64 if tensor.dtype == torch.float64 else torch.float32

"""What a matching cost looks at: queries on one side, targets of the same images on the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_gdino_lora.objective import cpu
from mmdet_gdino_lora.objective.boxes import l1_and_giou, xyxy_to_cxcywh
from mmdet_gdino_lora.objective.groups import Group
from mmdet_gdino_lora.objective.targets import Targets

#: Takes all of a dimension.
EVERY = slice(None)


class Pairs:
    """Q queries of l layers against n targets, each with the queries of its own image.

    A cost returns [l, n, Q]. What several costs need is computed once.

    Args:
        group: The predictions.
        counts: Targets of each of the images, n in all.
        target_boxes: [n, 4] as (cx, cy, w, h) in 0..1.
        image: int64 [n], each target's image among ``images``; ``EVERY`` where there is one.
        layers: Which of the group's.
        images: Which of the group's.
        rows: Which of the group's targets.
        tokens: Which of the group's T tokens the targets' spans are looked for in.
    """

    def __init__(
        self,
        group: Group,
        counts: list[int],
        target_boxes: Tensor,
        image: Tensor | slice = EVERY,
        layers: slice = EVERY,
        images: slice = EVERY,
        rows: slice = EVERY,
        tokens: Tensor | slice = EVERY,
    ) -> None:
        self.group = group
        self.counts = counts
        self.target_boxes = target_boxes
        self.image = image
        self.layers, self.images, self.rows, self.tokens = layers, images, rows, tokens
        self._distances = group.distances

    @classmethod
    def of(cls, group: Group, targets: Targets) -> Iterator[tuple[tuple[slice, slice], Pairs]]:
        """All pairs of a group: at once, or in pieces that fit a CPU's cache.

        Args:
            group: The predictions.
            targets: Of the same batch.

        Yields:
            The layers and targets that the piece is about, and its pairs.
        """
        if not cpu.runs_here(group.logits):  # to know the tokens, the host would have to wait
            yield (EVERY, EVERY), cls(group, targets.counts, targets.boxes, targets.image)
            return
        num_layers, _, num_queries, _ = group.logits.shape
        for images, rows, layers in cpu.pair_blocks(targets.counts, num_layers, num_queries):
            boxes, tokens = targets.boxes[rows], cpu.used_tokens(group.spans[rows])
            yield (
                (layers, rows),
                cls(group, [len(boxes)], boxes, EVERY, layers, images, rows, tokens),
            )

    @classmethod
    def from_instances(
        cls, pred_instances: InstanceData, gt_instances: InstanceData, img_meta: dict | None
    ) -> Pairs:
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

        # What a cost doesn't read isn't there: predictions may be without boxes, or without logits.
        logits = boxes = mask = spans = target_boxes = torch.empty(0)
        count = 0
        if 'scores' in pred_instances:
            logits = pred_instances.scores[None, None]
            mask = gt_instances.text_token_mask[:1].bool()
            spans = (gt_instances.positive_maps > 0) & mask
            count = len(spans)
        if 'bboxes' in pred_instances:
            boxes = normalised(pred_instances.bboxes)[None, None]
            target_boxes = normalised(gt_instances.bboxes)
            count = len(target_boxes)
        group = Group([''], ['layer'], logits, boxes, mask, spans)
        return cls(group, [count], target_boxes)

    def logits(self) -> Tensor:
        """Logits [l, b, Q, U] of the b images, for the U tokens that :meth:`spans` speaks of."""
        logits = self.group.logits.detach()[self.layers, self.images]
        if isinstance(self.tokens, Tensor):
            logits = cpu.take_tokens(logits, self.tokens)
        else:
            logits = logits[..., : self.group.mask.shape[1]]
        return logits.to(self.cost_dtype(logits))

    def spans(self) -> Tensor:
        """bool [n, U], the tokens of each target's span."""
        return self.group.spans[self.rows][:, self.tokens]

    def over_spans(self, values: Tensor, weights: Tensor) -> Tensor:
        """For each target, the weighted sum over tokens of its own image's values.

        Args:
            values: [l, b, Q, U].
            weights: [n, U].

        Returns:
            [l, n, Q].
        """
        sums = [
            weight @ values[:, image].transpose(-1, -2)
            for image, weight in enumerate(weights.split(self.counts))
        ]
        return torch.cat(sums, dim=1) if len(sums) > 1 else sums[0]

    def background(self, alpha: float, gamma: float) -> Tensor:
        """Focal loss of calling every valid token background, [l, n or 1, Q]."""
        sums = self.group.background_sums(alpha, gamma)
        return sums[self.layers, self.images][:, self.image]

    def l1(self) -> Tensor:
        """L1 distance of the boxes, [l, n, Q]."""
        return self._boxes_compared()[0]

    def giou(self) -> Tensor:
        """Generalised IoU of the boxes, [l, n, Q]."""
        return self._boxes_compared()[1]

    def _boxes_compared(self) -> tuple[Tensor, Tensor]:
        if self._distances is None:
            boxes = self.group.boxes.detach()[self.layers, self.images]
            planes = boxes.to(self.cost_dtype(boxes)).permute(3, 0, 1, 2).contiguous()
            targets = self.target_boxes.to(planes.dtype).t()[:, None, :, None]
            self._distances = l1_and_giou(planes[:, :, self.image], targets)
        return self._distances

    @classmethod
    def compare_boxes(cls, groups: Sequence[Group], targets: Targets) -> None:
        """Compare the boxes of several groups with the targets at once, where that is cheaper.

        Args:
            groups: That are matched; those with equally many queries are taken together.
            targets: Of the same batch.
        """
        boxes = [group.boxes.detach() for group in groups]
        alike = len({(len(b[0]), b.shape[2], b.dtype) for b in boxes}) == 1
        if len(groups) < 2 or not alike or cpu.runs_here(boxes[0]):
            return
        together = replace(groups[0], boxes=torch.cat(boxes))
        l1, giou = cls(together, targets.counts, targets.boxes, targets.image)._boxes_compared()
        sizes = [len(b) for b in boxes]
        for group, *distances in zip(groups, l1.split(sizes), giou.split(sizes)):
            group.distances = distances[0], distances[1]

    @staticmethod
    def cost_dtype(tensor: Tensor) -> torch.dtype:
        """float32 for half precision: costs are compared, and bf16 has three digits."""
        return torch.float64 if tensor.dtype == torch.float64 else torch.float32

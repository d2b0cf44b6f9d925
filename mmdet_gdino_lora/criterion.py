"""The training objective of Grounding DINO, for all layers and images of a step together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import Tensor, nn

from .boxes import BoxDistance
from .focal import (
    KnownGradient,
    background_focal,
    span_grad,
    span_minus_background,
)
from .matching import BoxGIoUCost, BoxL1Cost, HungarianMatcher, TokenFocalCost
from .matching.pairs import QuerySet, to_host

COMPONENTS = ('ce', 'bbox', 'giou')


@MODELS.register_module()
class GroundingDINOCriterion(nn.Module):
    """Hungarian matching, then token-level focal, L1 and GIoU losses (Grounding DINO, sec. 3.4).

    For every decoder layer and for the encoder's proposals:

    1. match targets to queries one to one, at the least total cost (:class:`HungarianMatcher`);
    2. sum over all queries and valid tokens the sigmoid focal loss, with target 1 on the span
       tokens of matched queries and 0 elsewhere (formulas in :mod:`mmdet_gdino_lora.focal`), and
       over the matched pairs ``|dcx| + |dcy| + |dw| + |dh|`` and ``1 - GIoU``; divide each by
       the number of boxes in the batch, averaged over the ranks, at least 1.

    This is DETR's criterion with the classes replaced by tokens. Padding tokens and logits of
    -inf contribute nothing, forward or backward.

    Args:
        num_classes: Number of classes the model is trained on; only for the log.
        num_decoder_layers: Number of decoder layers with a loss.
        focal_alpha: Focal weight of span tokens, in 0..1; other tokens have the rest.
        focal_gamma: Focal exponent, at least 0.
        ce_weight: Weight of the class losses in ``weight_dict``.
        bbox_weight: Weight of the L1 losses.
        giou_weight: Weight of the GIoU losses.
        background_weight: Factor on the class loss of unmatched queries. The paper's is 1; 0
            leaves the matched pairs alone.
        enc_target: 'objectness': the encoder's class loss has one class, whose logit is the
            largest valid token logit of the proposal (the score that picks the decoder's
            queries) and whose target is 1 for matched proposals. 'tokens': as the decoder
            layers, which is what mmdet and transformers do.
        match_costs: Configs of costs, or costs; see :class:`HungarianMatcher`. Default:
            ``TokenFocalCost`` 1 (with ``focal_alpha`` and ``focal_gamma``), ``BoxL1Cost`` 5,
            ``BoxGIoUCost`` 2.

    Attributes:
        weight_dict: Weight of every component that :meth:`forward` can return.
        matcher: The :class:`HungarianMatcher`.
    """

    def __init__(
        self,
        num_classes: int,
        num_decoder_layers: int = 6,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        ce_weight: float = 2.0,
        bbox_weight: float = 5.0,
        giou_weight: float = 2.0,
        background_weight: float = 1.0,
        enc_target: str = 'objectness',
        match_costs: Sequence | Mapping | None = None,
    ) -> None:
        super().__init__()
        if enc_target not in ('objectness', 'tokens'):
            raise ValueError(f"enc_target={enc_target!r} is not 'objectness' or 'tokens'")
        if num_decoder_layers < 1:
            raise ValueError(f'num_decoder_layers={num_decoder_layers} is not at least 1')
        self.num_classes = num_classes
        self.num_decoder_layers = num_decoder_layers
        self.focal_alpha = float(focal_alpha)
        self.focal_gamma = float(focal_gamma)
        self.background_weight = float(background_weight)
        self.enc_target = enc_target
        if match_costs is None:
            match_costs = (
                TokenFocalCost(1.0, self.focal_alpha, self.focal_gamma),
                BoxL1Cost(5.0),
                BoxGIoUCost(2.0),
            )
        self.matcher = HungarianMatcher(match_costs)
        weights = dict(zip(COMPONENTS, (ce_weight, bbox_weight, giou_weight)))
        aux = [f'_{i}' for i in range(num_decoder_layers - 1)]
        suffixes = ['', *aux, '_enc', '_dn', *(f'_dn{i}' for i in aux)]
        self.weight_dict = {
            f'loss_{name}{suffix}': float(weights[name])
            for suffix in suffixes
            for name in COMPONENTS
        }
        self._warned = False
        print_log(
            f'GroundingDINOCriterion: Hungarian matching with {self.matcher}; '
            f'{num_classes} classes; {num_decoder_layers} decoder layers; auxiliary losses of '
            f'{len(aux)} decoder layers and of the encoder ({enc_target}); '
            f'focal alpha {self.focal_alpha:g}, gamma {self.focal_gamma:g}, background weight '
            f'{self.background_weight:g}; loss weights '
            + ', '.join(f'{name} {weight:g}' for name, weight in weights.items()),
            logger='current',
        )

    def forward(
        self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """Compute every loss component.

        Args:
            outputs: The model's predictions, of any float type:

                - ``pred_logits`` [B, Q, T] and ``pred_boxes`` [B, Q, 4], (cx, cy, w, h) in 0..1,
                  of the last decoder layer. Logits may have more columns than the token mask;
                  those are padding.
                - ``text_token_mask`` [B, T] bool, True for valid tokens.
                - ``aux_outputs``: the same two for each earlier decoder layer, in order.
                - ``enc_outputs``: the same two for the encoder's proposals (any Q).
                - ``dn_outputs``: the same two for the denoising queries of all decoder layers,
                  [L, B, Qdn, T] and [L, B, Qdn, 4], and ``num_groups`` (int). As mmdet's
                  ``CdnQueryGenerator`` lays them out, each group has as many positive, then as
                  many negative queries as the image with the most boxes has boxes.

            targets: Per image ``labels`` [N] (int; rows with -1 are ignored), ``boxes`` [N, 4],
                (cx, cy, w, h) in 0..1, ``token_labels`` [N, T], non-zero on the tokens of the
                target's span.

        Returns:
            Unweighted components: ``loss_ce``, ``loss_bbox``, ``loss_giou`` of the last decoder
            layer, with ``_0``, ``_1``, ... of the earlier ones, ``_enc`` of the encoder, and
            ``_dn``, ``_dn_0``, ... of the denoising queries, as far as ``outputs`` has them.

        Raises:
            ValueError: Shapes that don't fit together, or predictions that are NaN or infinite
                (named by layer and image).
        """
        with torch.autocast(outputs['pred_logits'].device.type, enabled=False):
            batch = _Batch(outputs, targets)
            groups = self._groups(outputs, batch)
            return self._losses(groups, batch)

    def _groups(self, outputs: Mapping[str, Any], batch: _Batch) -> list[_Group]:
        """Sort the predictions by what they are matched to."""
        aux = list(outputs.get('aux_outputs') or ())
        enc = outputs.get('enc_outputs')
        self._check_auxiliary(len(aux), enc is not None)
        groups = [
            _Group(
                suffixes=['', *(f'_{i}' for i in range(len(aux)))],
                queries=QuerySet(
                    [f'decoder layer {len(aux)} (the last)']
                    + [f'decoder layer {i}' for i in range(len(aux))],
                    [layer['pred_logits'] for layer in (outputs, *aux)],
                    [layer['pred_boxes'] for layer in (outputs, *aux)],
                    batch.mask,
                    batch.spans,
                ),
            )
        ]
        if enc is not None:
            logits, mask, spans = enc['pred_logits'], batch.mask, batch.spans
            if self.enc_target == 'objectness':
                logits = objectness(logits, mask)
                mask = mask.new_ones((len(mask), 1))
                spans = [mask.new_ones((len(rows), 1)) for rows in spans]
            groups.append(
                _Group(
                    one_class=self.enc_target == 'objectness',
                    suffixes=['_enc'],
                    queries=QuerySet(['the encoder'], [logits], [enc['pred_boxes']], mask, spans),
                )
            )
        denoising = outputs.get('dn_outputs')
        if denoising is not None:
            logits, boxes = denoising['pred_logits'], denoising['pred_boxes']
            suffixes = ['_dn', *(f'_dn_{i}' for i in range(len(logits) - 1))]
            groups.append(
                _Group(
                    suffixes=suffixes,
                    queries=QuerySet(
                        [f'the denoising queries of decoder layer {i}' for i in range(len(logits))],
                        list(logits.unbind()),
                        list(boxes.unbind()),
                        batch.mask,
                        batch.spans,
                    ),
                    dn_groups=int(denoising['num_groups']),
                )
            )
            # as in the decoder: the last layer first
            queries = groups[-1].queries
            for per_layer in (queries.names, queries.logits, queries.boxes):
                per_layer.insert(0, per_layer.pop())
        return groups

    def _check_auxiliary(self, num_aux: int, has_enc: bool) -> None:
        """Warn once of losses that can't be computed."""
        expected = self.num_decoder_layers - 1
        if num_aux > expected:
            raise ValueError(
                f'the model has {num_aux + 1} decoder layers with outputs, the criterion was '
                f'built for num_decoder_layers={self.num_decoder_layers}'
            )
        if self._warned or (num_aux == expected and has_enc):
            return
        self._warned = True
        missing = [f'_{i}' for i in range(num_aux, expected)] + ([] if has_enc else ['_enc'])
        names = ', '.join(f'loss_{name}{suffix}' for suffix in missing for name in COMPONENTS)
        how = []
        if num_aux < expected:
            how.append("return 'aux_outputs' with pred_logits and pred_boxes of each earlier layer")
        if not has_enc:
            how.append("return 'enc_outputs' with pred_logits and pred_boxes of the proposals")
        warnings.warn(
            f'GroundingDINOCriterion: {names} are missing, since the model returned no outputs '
            f'for them; to have them, {" and ".join(how)} (in training mode)',
            stacklevel=4,
        )

    def _losses(self, groups: list[_Group], batch: _Batch) -> dict[str, Tensor]:
        for group in groups:
            self._background(group)
        on_device = []
        for group in groups:
            on_device.append(group.finiteness())
            if not group.dn_groups:
                on_device += self.matcher.cost_matrices(group.queries, batch.targets)
        # the step's one wait for the device
        host = iter(to_host([batch.keep, batch.all_spans, *on_device]))
        batch.arrived(next(host), next(host))
        for group in groups:
            group.check_finite(next(host))
            if group.dn_groups:
                group.assignment = denoising_assignment(group, batch.rows)
            else:
                costs = [next(host) for _ in batch.targets]
                group.assignment = self.matcher.assign(costs, batch.rows)

        matches = _Matches(groups, batch)
        divisor = _num_boxes(batch, groups)
        ce = self._class_losses(groups, matches)
        bbox, giou = _box_losses(groups, matches, batch)
        suffixes = [suffix for group in groups for suffix in group.suffixes]
        components = [(values / divisor).unbind() for values in (ce, bbox, giou)]
        return {
            f'loss_{name}{suffix}': values[i]
            for i, suffix in enumerate(suffixes)
            for name, values in zip(COMPONENTS, components)
        }

    def _background(self, group: _Group) -> None:
        """The dense part of the class loss, which doesn't wait for the matching."""
        queries = group.queries
        key = (self.focal_alpha, self.focal_gamma)
        results = [
            background_focal(
                logits, queries.mask, *key, torch.is_grad_enabled() and logits.requires_grad
            )
            for logits in queries.logits
        ]
        queries.background[key] = [sums for sums, _ in results]
        group.grads = [grad for _, grad in results]

    @torch.no_grad()
    def _span_terms(self, group: _Group, matches: list[_LayerMatches]) -> Tensor:
        """Finish the class losses [L] of a group, and their gradients in place."""
        key = (self.focal_alpha, self.focal_gamma)
        values = []
        for logits, sums, grad, match in zip(
            group.queries.logits, group.queries.background[key], group.grads, matches
        ):
            x = logits.detach()[match.span_index].to(sums.dtype)
            if self.background_weight != 1:
                weight = torch.full_like(sums, self.background_weight)
                weight.view(-1)[match.query] = 1
                sums = sums * weight
                if grad is not None:
                    grad.mul_(weight[..., None])
            # in float64: the background of confident spans is added here and taken away there
            total = sums.sum(dtype=torch.float64)
            spans = span_minus_background(x, *key).masked_fill_(x == -torch.inf, 0)
            total += spans.sum(dtype=torch.float64)
            values.append(total.to(sums.dtype))
            if grad is not None:
                grad[match.span_index] = span_grad(x, *key)
        return torch.stack(values)

    def _class_losses(self, groups: list[_Group], matches: _Matches) -> Tensor:
        """Summed class loss [S] of every layer of every group."""
        values, grads, logits = [], [], []
        for group, of_group in zip(groups, matches.by_group()):
            values.append(self._span_terms(group, of_group))
            grads += group.grads
            logits += group.queries.logits
        return KnownGradient.apply(torch.cat(values), grads, *logits)


def build_criterion(
    num_classes: int,
    num_decoder_layers: int = 6,
    focal_alpha: float = 0.25,
    focal_gamma: float = 2.0,
) -> GroundingDINOCriterion:
    """The criterion with the paper's matching costs and weights.

    Args:
        num_classes: Number of classes, for the log.
        num_decoder_layers: Number of decoder layers with a loss.
        focal_alpha: Focal weight of span tokens.
        focal_gamma: Focal exponent.
    """
    return GroundingDINOCriterion(num_classes, num_decoder_layers, focal_alpha, focal_gamma)


def objectness(logits: Tensor, mask: Tensor) -> Tensor:
    """The largest valid token logit of each proposal, [B, Q, 1], with gradient to that one.

    Args:
        logits: [B, Q, C], C at least T.
        mask: [B, T] bool, True for valid tokens.
    """
    valid = logits.detach()[..., : mask.shape[1]].masked_fill(~mask[:, None], -torch.inf)
    return logits.gather(-1, valid.argmax(dim=-1, keepdim=True))


class _Batch:
    """Targets of a batch, on the device, and after the transfer also on the host."""

    def __init__(self, outputs: Mapping[str, Any], targets: Sequence[Mapping[str, Any]]) -> None:
        logits = outputs['pred_logits']
        self.device = logits.device
        self.mask = outputs['text_token_mask'].to(self.device, non_blocking=True).bool()
        num_tokens = self.mask.shape[1]
        if len(targets) != len(logits) or len(self.mask) != len(logits):
            raise ValueError(
                f'pred_logits has {len(logits)} images, text_token_mask {len(self.mask)}, '
                f'targets {len(targets)}'
            )
        if logits.shape[-1] < num_tokens:
            raise ValueError(
                f'pred_logits has {logits.shape[-1]} tokens, text_token_mask {num_tokens}'
            )
        self.targets = []
        self.spans = []
        keep = []
        for image, (target, valid) in enumerate(zip(targets, self.mask)):
            labels, boxes, tokens = (
                target[key].to(self.device, non_blocking=True)
                for key in ('labels', 'boxes', 'token_labels')
            )
            if not len(labels) == len(boxes) == len(tokens):
                raise ValueError(
                    f'target of image {image}: {len(labels)} labels, {len(boxes)} boxes, '
                    f'{len(tokens)} rows of token_labels'
                )
            boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32)).view(-1, 4)
            self.targets.append({**target, 'labels': labels, 'boxes': boxes})
            spans = valid.new_zeros((len(labels), num_tokens))
            if len(labels):
                tokens = tokens[:, :num_tokens]
                torch.logical_and(
                    tokens > 0, valid[: tokens.shape[1]], out=spans[:, : tokens.shape[1]]
                )
            self.spans.append(spans)
            keep.append(labels >= 0)
        self.sizes = [len(rows) for rows in self.spans]
        self.boxes = torch.cat([target['boxes'] for target in self.targets])
        self.all_spans = torch.cat(self.spans)
        self.keep = torch.cat(keep)

    def arrived(self, keep: np.ndarray, spans: np.ndarray) -> None:
        """Take in what the host has to know of the targets."""
        self.first = np.cumsum([0, *self.sizes[:-1]])
        self.rows = np.split(keep.astype(bool), self.first[1:])
        self.host_spans = spans.astype(bool)
        self.num_boxes = int(keep.sum())


@dataclass
class _Group:
    """Layers whose queries are assigned in the same way.

    Attributes:
        suffixes: Of the component names, per layer.
        queries: The predictions.
        dn_groups: Number of denoising groups; 0 for queries that are matched.
        one_class: The only token is objectness, which every target spans.
        grads: Per layer the gradient of the summed class loss, or None.
        assignment: Per layer and image, (queries, targets).
    """

    suffixes: list[str]
    queries: QuerySet
    dn_groups: int = 0
    one_class: bool = False
    grads: list[Tensor | None] = ()
    assignment: list = ()

    def finiteness(self) -> Tensor:
        """[2, L, B], finite where the logits and the boxes of a layer and image are."""
        (sums,) = self.queries.background.values()
        boxes = [boxes.detach().flatten(1).float().sum(1) for boxes in self.queries.boxes]
        return torch.stack([torch.stack([s.sum(1) for s in sums]).float(), torch.stack(boxes)])

    def check_finite(self, values: np.ndarray) -> None:
        """Raise for the first layer and image with NaN or infinite predictions."""
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            kind, layer, image = bad[0]
            raise ValueError(
                f'{("pred_logits", "pred_boxes")[kind]} of {self.queries.names[layer]}, image '
                f'{image} of the batch, hold NaN or infinite values: the training has diverged; '
                'lower the learning rate, clip gradients, or use bfloat16 instead of float16'
            )


def denoising_assignment(group: _Group, rows: Sequence[np.ndarray]) -> list:
    """The known assignment of denoising queries (DINO, sec. 3.3), per layer and image.

    In each group the first half of the queries are noised targets, in the targets' order and
    padded to the image with the most; the second half are negatives, which have no target.
    """
    num_queries = group.queries.logits[0].shape[1]
    per_group = num_queries // group.dn_groups
    starts = np.arange(group.dn_groups)[:, None] * per_group
    images = []
    for keep in rows:
        target = np.flatnonzero(keep)
        query = (starts + target).reshape(-1)
        images.append((query, np.tile(target, group.dn_groups)))
    return [images] * len(group.queries.logits)


@dataclass
class _LayerMatches:
    """Matched pairs of one layer on the device.

    Attributes:
        query: [M] numbers among all B * Q queries of the layer.
        target: [M] numbers among all targets of the batch.
        span_index: Image, query and token of every (matched query, span token).
    """

    query: Tensor
    target: Tensor
    span_index: tuple[Tensor, Tensor, Tensor]


class _Matches:
    """Assignments as index tensors, made on the host and uploaded together."""

    def __init__(self, groups: list[_Group], batch: _Batch) -> None:
        arrays = []
        self.num_layers = [len(group.suffixes) for group in groups]
        for group in groups:
            num_queries = group.queries.logits[0].shape[1]
            for layer in group.assignment:
                query = np.concatenate([q for q, _ in layer])
                target = np.concatenate([t + first for (_, t), first in zip(layer, batch.first)])
                image = np.repeat(np.arange(len(layer)), [len(q) for q, _ in layer])
                if group.one_class:
                    row, token = np.arange(len(query)), np.zeros(len(query), np.int64)
                else:
                    row, token = np.nonzero(batch.host_spans[target])
                arrays += [image * num_queries + query, target, image[row], query[row], token]
        flat = torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))
        parts = _to_device(flat, batch.device).split([len(array) for array in arrays])
        self.layers = [
            _LayerMatches(query, target, (image, row, token))
            for query, target, image, row, token in zip(*[iter(parts)] * 5)
        ]

    def by_group(self) -> list[list[_LayerMatches]]:
        """The layers of each group."""
        layers = iter(self.layers)
        return [[next(layers) for _ in range(count)] for count in self.num_layers]


def _box_losses(groups: list[_Group], matches: _Matches, batch: _Batch) -> tuple[Tensor, Tensor]:
    """Summed L1 [S] and 1 - GIoU [S] of the matched pairs of every layer (DETR, eqs. 9, 10).

    Without pairs they are zero, yet part of the graph: in distributed training every parameter
    needs its gradient on every rank.
    """
    boxes = [boxes.flatten(0, 1) for group in groups for boxes in group.queries.boxes]
    index, first = [], 0
    for layer, match in zip(boxes, matches.layers):
        index.append(match.query + first)
        first += len(layer)
    predicted = torch.cat(boxes).index_select(0, torch.cat(index))
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    target = batch.boxes.index_select(0, torch.cat([match.target for match in matches.layers]))
    distance = BoxDistance.between(predicted.unbind(1), target.unbind(1))
    losses = torch.stack((distance.l1(), 1 - distance.giou()))
    per_layer = losses.split([len(match.query) for match in matches.layers], dim=1)
    return torch.stack([layer.sum(1) for layer in per_layer], dim=1).unbind()


def _num_boxes(batch: _Batch, groups: list[_Group]) -> Tensor:
    """Divisor of every layer's losses [S]: boxes in the batch, averaged over ranks, at least 1.

    For denoising queries every group counts the boxes again, as in mmdet's and DINO's heads.
    """
    dn_groups = max(group.dn_groups for group in groups)
    counts = torch.tensor([batch.num_boxes, batch.num_boxes * dn_groups], dtype=torch.float32)
    counts = _to_device(counts, batch.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
        counts = counts / torch.distributed.get_world_size()
    counts = counts.clamp(min=1)
    return torch.cat(
        [counts[int(group.dn_groups > 0)].expand(len(group.suffixes)) for group in groups]
    )


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Upload without waiting for the device."""
    if device.type != 'cuda':
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

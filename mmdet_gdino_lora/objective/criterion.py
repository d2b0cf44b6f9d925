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

from mmdet_gdino_lora.objective import BoxGIoUCost, BoxL1Cost, HungarianMatcher, TokenFocalCost
from mmdet_gdino_lora.objective.assignment import (
    LayerMatches,
    denoising_assignment,
    layer_indices,
    on_device,
    to_device,
    to_host,
)
from mmdet_gdino_lora.objective.boxes import BoxDistance
from mmdet_gdino_lora.objective.focal import (
    KnownGradient,
    background_focal,
    span_grad,
    span_minus_background,
)
from mmdet_gdino_lora.objective.pairs import QuerySet
from mmdet_gdino_lora.objective.targets import Targets

COMPONENTS = ('ce', 'bbox', 'giou')


@MODELS.register_module()
class GroundingDINOCriterion(nn.Module):
    """Hungarian matching, then token-level focal, L1 and GIoU losses (Grounding DINO, sec. 3.4).

    For every decoder layer and for the encoder's proposals:

    1. match targets to queries one to one, at the least total cost (:class:`HungarianMatcher`);
    2. sum over all queries and valid tokens the sigmoid focal loss, with target 1 on the span
       tokens of matched queries and 0 elsewhere (formulas in
       :mod:`~mmdet_gdino_lora.objective.focal`), and over the matched pairs
       ``|dcx| + |dcy| + |dw| + |dh|`` and ``1 - GIoU``; divide each by
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
            targets = Targets(outputs, targets)
            return self._losses(self._groups(outputs, targets), targets)

    def _groups(self, outputs: Mapping[str, Any], targets: Targets) -> list[_Group]:
        """Sort the predictions by how they get their targets."""
        aux = list(outputs.get('aux_outputs') or ())
        enc = outputs.get('enc_outputs')
        self._check_auxiliary(len(aux), enc is not None)
        names = [f'decoder layer {i}' for i in range(len(aux) + 1)]
        groups = [_Group(['', *_numbered(len(aux))], _queries(names, [*aux, outputs], targets))]
        if enc is not None:
            queries = _queries(['the encoder'], [enc], targets)
            if self.enc_target == 'objectness':
                queries.logits = [objectness(enc['pred_logits'], targets.mask)]
                queries.mask = targets.mask.new_ones((len(targets.mask), 1))
                queries.spans = [queries.mask.new_ones((len(s), 1)) for s in targets.spans]
            groups.append(_Group(['_enc'], queries, one_class=self.enc_target == 'objectness'))
        denoising = outputs.get('dn_outputs')
        if denoising is not None:
            logits, boxes = denoising['pred_logits'].unbind(), denoising['pred_boxes'].unbind()
            layers = [dict(pred_logits=a, pred_boxes=b) for a, b in zip(logits, boxes)]
            names = [f'the denoising queries of decoder layer {i}' for i in range(len(layers))]
            suffixes = ['_dn', *(f'_dn{i}' for i in _numbered(len(layers) - 1))]
            queries = _queries(names, layers, targets)
            groups.append(_Group(suffixes, queries, dn_groups=int(denoising['num_groups'])))
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

    def _losses(self, groups: list[_Group], targets: Targets) -> dict[str, Tensor]:
        for group in groups:
            self._background(group)
        matches = self._match(groups, targets)
        divisor = _num_boxes(targets, groups)
        ce = self._class_losses(groups, matches)
        bbox, giou = _box_losses(groups, matches, targets)
        suffixes = [suffix for group in groups for suffix in group.suffixes]
        components = [(values / divisor).unbind() for values in (ce, bbox, giou)]
        return {
            f'loss_{name}{suffix}': values[i]
            for i, suffix in enumerate(suffixes)
            for name, values in zip(COMPONENTS, components)
        }

    def _match(self, groups: list[_Group], targets: Targets) -> list[LayerMatches]:
        """The matched pairs of every layer of every group."""
        wanted = targets.for_host()
        for group in groups:
            wanted.append(group.finiteness())
            if not group.dn_groups:
                wanted += self.matcher.cost_matrices(group.queries, targets.per_image)
        host = iter(to_host(wanted))
        targets.arrived(next(host), next(host))
        layers = []
        for group in groups:
            group.check_finite(next(host))
            num_queries = group.queries.logits[0].shape[1]
            if group.dn_groups:
                assignment = denoising_assignment(
                    num_queries, group.dn_groups, len(group.suffixes), targets.rows
                )
            else:
                costs = [next(host) for _ in targets.per_image]
                assignment = self.matcher.assign(costs, targets.rows)
            layers += [
                layer_indices(layer, num_queries, targets, group.one_class) for layer in assignment
            ]
        return on_device(layers, targets.device)

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
    def _span_terms(self, group: _Group, matches: list[LayerMatches]) -> Tensor:
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

    def _class_losses(self, groups: list[_Group], matches: list[LayerMatches]) -> Tensor:
        """Summed class loss [S] of every layer of every group."""
        values, grads, logits, of_layers = [], [], [], iter(matches)
        for group in groups:
            values.append(self._span_terms(group, [next(of_layers) for _ in group.suffixes]))
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
        mask: [B, T] bool, True for valid tokens. An image without any has -inf.
    """
    valid = logits.detach()[..., : mask.shape[1]].masked_fill(~mask[:, None], -torch.inf)
    largest = logits.gather(-1, valid.argmax(dim=-1, keepdim=True))
    return largest.masked_fill(~mask.any(dim=1)[:, None, None], -torch.inf)


@dataclass
class _Group:
    """Layers whose queries are assigned in the same way.

    Attributes:
        suffixes: Of the component names, per layer.
        queries: The predictions.
        dn_groups: Number of denoising groups; 0 for queries that are matched.
        one_class: The only token is objectness, which every target spans.
        grads: Per layer the gradient of the summed class loss, or None.
    """

    suffixes: list[str]
    queries: QuerySet
    dn_groups: int = 0
    one_class: bool = False
    grads: Sequence[Tensor | None] = ()

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


def _numbered(count: int) -> list[str]:
    return [f'_{i}' for i in range(count)]


def _queries(names: list[str], layers: list[Mapping[str, Any]], targets: Targets) -> QuerySet:
    """Layers in the order of their component names: the last one has no number, so it is first."""
    names, layers = [names[-1], *names[:-1]], [layers[-1], *layers[:-1]]
    return QuerySet(
        names,
        [layer['pred_logits'] for layer in layers],
        [layer['pred_boxes'] for layer in layers],
        targets.mask,
        targets.spans,
    )


def _box_losses(
    groups: list[_Group], matches: list[LayerMatches], targets: Targets
) -> tuple[Tensor, Tensor]:
    """Summed L1 [S] and 1 - GIoU [S] of the matched pairs of every layer (DETR, eqs. 9, 10).

    Without pairs they are zero, yet part of the graph: in distributed training every parameter
    needs its gradient on every rank.
    """
    boxes = [boxes.flatten(0, 1) for group in groups for boxes in group.queries.boxes]
    index, first = [], 0
    for layer, match in zip(boxes, matches):
        index.append(match.query + first)
        first += len(layer)
    predicted = torch.cat(boxes).index_select(0, torch.cat(index))
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    target = targets.boxes.index_select(0, torch.cat([match.target for match in matches]))
    distance = BoxDistance.between(predicted.unbind(1), target.unbind(1))
    losses = torch.stack((distance.l1(), 1 - distance.giou()))
    per_layer = losses.split([len(match.query) for match in matches], dim=1)
    return torch.stack([layer.sum(1) for layer in per_layer], dim=1).unbind()


def _num_boxes(targets: Targets, groups: list[_Group]) -> Tensor:
    """Divisor of every layer's losses [S]: boxes in the batch, averaged over ranks, at least 1.

    For denoising queries every group counts the boxes again, as in mmdet's and DINO's heads.
    """
    dn_groups = max(group.dn_groups for group in groups)
    counts = torch.tensor([targets.num_boxes, targets.num_boxes * dn_groups], dtype=torch.float32)
    counts = to_device(counts, targets.device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
        counts = counts / torch.distributed.get_world_size()
    counts = counts.clamp(min=1)
    return torch.cat(
        [counts[int(group.dn_groups > 0)].expand(len(group.suffixes)) for group in groups]
    )

"""The training objective of Grounding DINO, for all layers and images of a step together."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdet_gdino_lora.errors import NonFiniteError
from mmdet_gdino_lora.objective.boxes import L1AndGIoU
from mmdet_gdino_lora.objective.costs import BoxGIoUCost, BoxL1Cost, TokenFocalCost
from mmdet_gdino_lora.objective.focal import (
    KnownGradient,
    background_focal,
    span_grad,
    span_minus_background,
)
from mmdet_gdino_lora.objective.groups import (
    Group,
    decoder_group,
    denoising_group,
    encoder_group,
)
from mmdet_gdino_lora.objective.matcher import HungarianMatcher
from mmdet_gdino_lora.objective.matches import Matches, match
from mmdet_gdino_lora.objective.targets import Targets
from mmdet_gdino_lora.transfer import to_device

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
        on_nonfinite: Called with the error where predictions or costs of a training step are NaN or
            infinite, in place of raising it: every component is NaN then, and so is every gradient,
            on all ranks, none of which is left waiting. None: the error is raised.
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
        self.on_nonfinite: Callable[[NonFiniteError], None] | None = None
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
                - ``decoder_outputs``, where the model has its layers in one tensor: the same two
                  for all decoder layers, [L, B, Q, T] and [L, B, Q, 4], the last one last. It is
                  read in place of the above and spares putting them together.
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
            ConfigError: A target (of a label that isn't -1) whose ``token_labels`` are all zero.
        """
        with torch.autocast(outputs['text_token_mask'].device.type, enabled=False):
            batch = Targets.of(outputs, targets)
            groups = self._groups(outputs, batch)
            grads = [self._background(group) for group in groups]  # doesn't wait for the matching
            try:
                matches, num_boxes = match(groups, batch, self.matcher)
            except NonFiniteError as error:
                if self.on_nonfinite is None or not torch.is_grad_enabled():
                    raise
                self.on_nonfinite(error)
                sums, num_boxes = nothing_but_nan(groups), len(batch.boxes)
            else:
                sums = self._losses(groups, matches, grads, batch)
            return _named(groups, sums / divisors(num_boxes, groups, sums.device))

    def _groups(self, outputs: Mapping[str, Any], targets: Targets) -> list[Group]:
        """Sort the predictions by how they get their targets."""
        groups = [decoder_group(outputs, targets)]
        if outputs.get('enc_outputs') is not None:
            groups.append(encoder_group(outputs, targets, self.enc_target))
        self._check_auxiliary(len(groups[0].suffixes) - 1, len(groups) > 1)
        if outputs.get('dn_outputs') is not None:
            groups.append(denoising_group(outputs, targets))
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

    def _losses(
        self,
        groups: list[Group],
        matches: list[Matches],
        grads: list[Tensor | None],
        targets: Targets,
    ) -> Tensor:
        """The three components, summed over a layer's queries or pairs: [3, S]."""
        ce = self._class_losses(groups, matches, grads)
        return torch.cat((ce[None], box_losses(groups, matches, targets)))

    def _background(self, group: Group) -> Tensor | None:
        """The dense part of the class loss, kept by the group; returns its gradient, if wanted."""
        key = (self.focal_alpha, self.focal_gamma)
        with_grad = torch.is_grad_enabled() and group.logits.requires_grad
        group.background[key], grad = background_focal(group.logits, group.mask, *key, with_grad)
        return grad

    def _class_losses(
        self, groups: list[Group], matches: list[Matches], grads: list[Tensor | None]
    ) -> Tensor:
        """Summed class loss of every layer [S]: the background's, corrected on the spans."""
        key = (self.focal_alpha, self.focal_gamma)
        logits = [group.logits for group in groups]
        with torch.no_grad():
            counts = [len(found.span[0]) for found in matches]
            x = torch.cat(
                [
                    x[found.span].to(torch.promote_types(x.dtype, torch.float32))
                    for x, found in zip(logits, matches)
                ]
            )
            changes = span_minus_background(x, *key).masked_fill_(x == -torch.inf, 0)
            slopes = span_grad(x, *key)
            values = []
            for group, found, grad, change, slope in zip(
                groups, matches, grads, changes.double().split(counts), slopes.split(counts)
            ):
                sums = self._weighted(group.background[key], found, grad)
                if grad is not None:
                    grad[found.span] = slope.to(grad.dtype)
                # in float64: the background of confident spans is added here and taken away there
                total = sums.sum((1, 2), dtype=torch.float64)
                values.append(total.add_(layer_sums(change, found.span_counts)))
        return KnownGradient.apply(torch.cat(values).to(x.dtype), grads, *logits)

    def _weighted(self, sums: Tensor, found: Matches, grad: Tensor | None) -> Tensor:
        """Background losses [L, B, Q] with ``background_weight`` on unmatched queries."""
        if self.background_weight == 1:
            return sums
        weight = torch.full_like(sums, self.background_weight)
        weight.view(-1)[found.query] = 1
        if grad is not None:
            grad.mul_(weight[..., None])
        return sums * weight


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


def box_losses(groups: Sequence[Group], matches: Sequence[Matches], targets: Targets) -> Tensor:
    """Summed L1 and 1 - GIoU of the matched pairs of every layer, [2, S] (DETR, eqs. 9, 10).

    Without pairs they are zero, yet part of the graph: in distributed training every parameter
    needs its gradient on every rank.

    Args:
        groups: The predictions; S layers in all.
        matches: Their pairs.
        targets: Of the same batch.
    """
    predicted = torch.cat(
        [group.boxes.reshape(-1, 4)[found.query.view(-1)] for group, found in zip(groups, matches)]
    )
    predicted = predicted.to(torch.promote_types(predicted.dtype, torch.float32))
    wanted = targets.boxes[torch.cat([found.target.view(-1) for found in matches])]
    l1, giou = L1AndGIoU.apply(predicted.t(), wanted.t())
    losses = torch.stack((l1, 1 - giou)).split([found.query.numel() for found in matches], dim=1)
    sums = [part.view(2, *found.query.shape).sum(-1) for part, found in zip(losses, matches)]
    return torch.cat(sums, dim=1)


def layer_sums(values: Tensor, counts: Sequence[int]) -> Tensor:
    """Sums [L] of values that stand layer after layer, ``counts`` of each."""
    if len(set(counts)) == 1:  # as long as there are no more boxes than queries
        return values.view(len(counts), -1).sum(1)
    return torch.stack([part.sum() for part in values.split(list(counts))])


def nothing_but_nan(groups: Sequence[Group]) -> Tensor:
    """Sums [3, S] that are NaN, as are the gradients of everything that the predictions depend on.

    Args:
        groups: The predictions; S layers in all.
    """
    total = torch.stack(
        [group.logits.float().sum() + group.boxes.float().sum() for group in groups]
    )
    count = sum(len(group.suffixes) for group in groups)
    return (total.sum() * torch.nan).expand(len(COMPONENTS), count)


def divisors(num_boxes: int, groups: Sequence[Group], device: torch.device) -> Tensor:
    """Divisor of every layer's losses [S]: boxes in the batch, averaged over ranks, at least 1.

    For denoising queries every group counts the boxes again, as in mmdet's and DINO's heads.
    Without gradients the boxes are this rank's own: nobody descends on such losses, and ranks that
    validate need not have equally many batches with ground truth to wait for each other in.

    Args:
        num_boxes: Targets that count, on this rank.
        groups: The predictions.
        device: Of the result.
    """
    boxes = [num_boxes * max(1, group.dn_groups) for group in groups for _ in group.suffixes]
    counts = to_device(np.array(boxes, dtype=np.float32), device)
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and torch.is_grad_enabled():
        torch.distributed.all_reduce(counts)
        counts = counts / torch.distributed.get_world_size()
    return counts.clamp(min=1)


def _named(groups: Sequence[Group], values: Tensor) -> dict[str, Tensor]:
    """Values [3, S] under their components' names; of each group the last layer comes first."""
    suffixes = [suffix for group in groups for suffix in group.suffixes]
    ce, bbox, giou = (dict(zip(suffixes, component.unbind())) for component in values.unbind())
    return {
        f'loss_{name}{suffix}': component[suffix]
        for group in groups
        for suffix in (group.suffixes[-1], *group.suffixes[:-1])
        for name, component in zip(COMPONENTS, (ce, bbox, giou))
    }

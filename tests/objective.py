"""Inputs for the objective's tests, and the objective written out slowly in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment


def draw(
    seed: int,
    sizes: Sequence[int] = (3, 0, 5),
    num_queries: int = 12,
    num_tokens: int = 9,
    num_layers: int = 3,
    columns: int | None = None,
    one_caption: bool = False,
    degenerate: bool = False,
    dtype: torch.dtype = torch.float32,
    dn_groups: int = 0,
    enc_queries: int | None = None,
    device: str = 'cpu',
) -> tuple[dict, list[dict]]:
    """Random outputs and targets in the plain form; the last token is always in some span."""
    rng = np.random.default_rng(seed)
    batch = len(sizes)
    columns = columns or num_tokens

    lengths = np.full(batch, num_tokens)
    if not one_caption and batch > 1:
        lengths[1:] = rng.integers(max(1, num_tokens // 2), num_tokens + 1, batch - 1)
    mask = torch.zeros(batch, num_tokens, dtype=torch.bool)
    for image, length in enumerate(lengths):
        mask[image, :length] = True

    def predictions(*shape: int) -> dict:
        logits = torch.from_numpy(rng.normal(-2, 2.5, (*shape, columns))).to(dtype)
        padded = torch.nn.functional.pad(mask, (0, columns - num_tokens))
        logits.masked_fill_(~padded[:, None], -torch.inf)
        centre = rng.uniform(0.05, 0.95, (*shape, 2))
        size = rng.uniform(0.01, 0.6, (*shape, 2))
        boxes = torch.from_numpy(np.concatenate((centre, size), -1)).to(dtype)
        return dict(
            pred_logits=logits.to(device).requires_grad_(),
            pred_boxes=boxes.to(device).requires_grad_(),
        )

    outputs = predictions(batch, num_queries)
    outputs['aux_outputs'] = [predictions(batch, num_queries) for _ in range(num_layers - 1)]
    outputs['enc_outputs'] = predictions(batch, enc_queries or num_queries)
    outputs['text_token_mask'] = mask.to(device)
    if dn_groups:
        outputs['dn_outputs'] = dict(
            predictions(num_layers, batch, 2 * dn_groups * max(sizes)), num_groups=dn_groups
        )
    targets = []
    for size, length in zip(sizes, lengths):
        boxes = np.concatenate(
            (rng.uniform(0.1, 0.9, (size, 2)), rng.uniform(0.02, 0.5, (size, 2))), -1
        )
        if degenerate:
            boxes[::3, 2] = 0
            boxes[1::3, 2:] = 1e-4
        labels = rng.integers(0, 4, size)
        spans = torch.zeros(size, columns)
        for row, label in enumerate(labels):
            end = length - 2 * label
            spans[row, max(0, end - rng.integers(1, 4)) : max(1, end)] = 1
        targets.append(
            dict(
                labels=torch.from_numpy(labels).to(device),
                boxes=torch.from_numpy(boxes).float().to(device),
                token_labels=spans.to(device),
            )
        )
    return outputs, targets


def leaves(outputs: dict) -> list[torch.Tensor]:
    """Every tensor of the outputs that takes a gradient, in a fixed order."""
    found = []
    for value in outputs.values():
        if isinstance(value, dict):
            found += leaves(value)
        elif isinstance(value, list):
            found += [leaf for part in value for leaf in leaves(part)]
        elif torch.is_tensor(value) and value.requires_grad:
            found.append(value)
    return found


def to_double(outputs: dict) -> dict:
    """A copy in float64, of new leaves."""
    copy = {}
    for key, value in outputs.items():
        if isinstance(value, dict):
            copy[key] = to_double(value)
        elif isinstance(value, list):
            copy[key] = [to_double(part) for part in value]
        elif torch.is_tensor(value) and value.requires_grad:
            copy[key] = value.detach().double().requires_grad_()
        else:
            copy[key] = value
    return copy


def corners(boxes: torch.Tensor) -> torch.Tensor:
    cx, cy, w, h = boxes.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), -1)


def giou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """GIoU of [N, 4] and [M, 4] corners by the definition, with mmdet's limits without area."""
    a, b = a[:, None], b[None]
    inter = (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2])).clamp(min=0)
    hull = torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2])
    inter, hull = inter.prod(-1), hull.prod(-1).clamp(min=1e-12)
    area_a, area_b = (a[..., 2:] - a[..., :2]).prod(-1), (b[..., 2:] - b[..., :2]).prod(-1)
    union = (area_a + area_b - inter).clamp(min=1e-12)
    return inter / union - (hull - union) / hull


class Reference:
    """The objective, one layer, image and query set at a time, in float64."""

    def __init__(
        self,
        alpha: float = 0.25,
        gamma: float = 2.0,
        background_weight: float = 1.0,
        enc_target: str = 'objectness',
        costs: Sequence[float] = (1.0, 5.0, 2.0),
        binary_cost: bool = False,
    ) -> None:
        self.alpha, self.gamma = alpha, gamma
        self.background_weight = background_weight
        self.enc_target = enc_target
        self.costs = costs
        self.binary_cost = binary_cost

    def focal(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction='none')
        p_t = torch.where(target > 0, logits.sigmoid(), (-logits).sigmoid())
        alpha_t = torch.where(target > 0, self.alpha, 1 - self.alpha)
        return alpha_t * (1 - p_t) ** self.gamma * bce

    def cost(self, logits, boxes, spans, targets) -> torch.Tensor:
        ones, zeros = torch.ones_like(logits), torch.zeros_like(logits)
        positive, negative = self.focal(logits, ones), self.focal(logits, zeros)
        if self.binary_cost:
            class_cost = positive @ spans.t() + negative @ (1 - spans).t()
        else:
            class_cost = (positive - negative) @ (spans / spans.sum(1, keepdim=True)).t()
        l1 = (boxes[:, None] - targets[None]).abs().sum(-1)
        weights = self.costs
        return (
            weights[0] * class_cost
            + weights[1] * l1
            - weights[2] * giou(corners(boxes), corners(targets))
        )

    def layer(self, layer: dict, mask, targets, tokens: str = 'tokens', groups: int = 0) -> tuple:
        """Losses ce, bbox, giou of one layer; ``groups`` of denoising queries, 0 to match."""
        ce = bbox = giou_loss = layer['pred_boxes'].sum() * 0
        for image, target in enumerate(targets):
            valid = mask[image]
            logits = layer['pred_logits'][image][:, : len(valid)][:, valid]
            boxes = layer['pred_boxes'][image]
            keep = target['labels'] >= 0
            wanted = target['boxes'][keep].double()
            spans = target['token_labels'][keep][:, : len(valid)][:, valid].double()
            if tokens == 'objectness':
                logits, spans = logits.max(-1, keepdim=True).values, spans[:, :1] * 0 + 1
            if groups:
                per_group = len(boxes) // groups
                rows = [
                    (g * per_group + int(k), j)
                    for g in range(groups)
                    for j, k in enumerate(keep.nonzero())
                ]
                query = torch.tensor([q for q, _ in rows], dtype=torch.long)
                index = torch.tensor([t for _, t in rows], dtype=torch.long)
            elif len(wanted):
                cost = self.cost(logits.detach(), boxes.detach(), spans, wanted)
                query, index = map(torch.as_tensor, linear_sum_assignment(cost))
            else:
                query = index = torch.zeros(0, dtype=torch.long)
            target_map = torch.zeros_like(logits)
            target_map[query] = spans[index]
            weight = torch.full_like(logits, self.background_weight)
            weight[query] = 1
            ce = ce + (self.focal(logits, target_map) * weight).sum()
            bbox = bbox + (boxes[query] - wanted[index]).abs().sum()
            overlap = giou(corners(boxes[query]), corners(wanted[index])).diagonal()
            giou_loss = giou_loss + (1 - overlap).sum()
        count = sum(int((target['labels'] >= 0).sum()) for target in targets)
        divisor = max(1, count * max(groups, 1))
        return ce / divisor, bbox / divisor, giou_loss / divisor

    def __call__(self, outputs: dict, targets: list[dict]) -> dict:
        mask = outputs['text_token_mask']
        layers = {'': self.layer(outputs, mask, targets)}
        for i, layer in enumerate(outputs.get('aux_outputs', ())):
            layers[f'_{i}'] = self.layer(layer, mask, targets)
        if 'enc_outputs' in outputs:
            layers['_enc'] = self.layer(outputs['enc_outputs'], mask, targets, self.enc_target)
        if 'dn_outputs' in outputs:
            dn = outputs['dn_outputs']
            last = len(dn['pred_logits']) - 1
            for i in range(last + 1):
                layer = {key: dn[key][i] for key in ('pred_logits', 'pred_boxes')}
                layers['_dn' if i == last else f'_dn_{i}'] = self.layer(
                    layer, mask, targets, groups=dn['num_groups']
                )
        return {
            f'loss_{name}{suffix}': value
            for suffix, values in layers.items()
            for name, value in zip(('ce', 'bbox', 'giou'), values)
        }


def assert_same(ours: dict, theirs: dict, rtol: float = 1e-5, atol: float = 5e-7) -> None:
    """Same components, relative difference under ``rtol``."""
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name].detach().double(),
            value.detach().double(),
            rtol=rtol,
            atol=atol,
            msg=lambda text, name=name: f'{name}: {text}',
        )


def assert_same_gradients(ours, theirs, rtol: float = 1e-4) -> None:
    """Gradients whose largest difference is under ``rtol`` of the largest entry."""
    for mine, other in zip(ours, theirs):
        mine = torch.zeros_like(other) if mine is None else mine.double()
        other = other.double()
        assert torch.isfinite(mine).all()
        scale = other.abs().max().clamp(min=1e-6) if other.numel() else 1
        difference = (mine - other).abs().max() if other.numel() else 0
        assert difference <= rtol * scale, f'{difference} of {scale}'

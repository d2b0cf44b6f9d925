"""The matched pairs of a step: found with one transfer to the host, and brought back with one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdet_gdino_lora.objective.groups import Group
from mmdet_gdino_lora.objective.host import to_host
from mmdet_gdino_lora.objective.matcher import HungarianMatcher
from mmdet_gdino_lora.objective.pairs import Pairs
from mmdet_gdino_lora.objective.targets import HostTargets, Targets
from mmdet_gdino_lora.transfer import to_device


@dataclass
class Matches:
    """Matched pairs of a group, M in each of its L layers, on the device.

    Attributes:
        query: int64 [L, M], numbers among all L * B * Q queries of the group.
        target: int64 [L, M], numbers among all N targets of the batch.
        span: Layer, image, query and token of every (matched query, span token), ordered by layer:
            an index into the group's logits.
        span_counts: Of these, how many each layer has.
    """

    query: Tensor
    target: Tensor
    span: tuple[Tensor, Tensor, Tensor, Tensor]
    span_counts: list[int]


def match(
    groups: Sequence[Group], targets: Targets, matcher: HungarianMatcher
) -> tuple[list[Matches], int]:
    """Match every layer of every group.

    Args:
        groups: The predictions.
        targets: Of the same batch.
        matcher: For the groups that are not denoising.

    Returns:
        Each group's pairs, and the number of targets that count.

    Raises:
        ValueError: Predictions or costs that are NaN or infinite.
        ConfigError: A target without a token in its caption.
    """
    wanted = targets.for_host()
    with torch.no_grad():
        Pairs.compare_boxes([group for group in groups if not group.dn_groups], targets)
    for number, group in enumerate(groups):
        wanted[f'{number}.finiteness'] = group.finiteness()
        if not group.dn_groups:
            wanted[f'{number}.costs'] = matcher.cost_matrix(group, targets)
    host = to_host(wanted)
    known = HostTargets(targets.counts, *(host[name] for name in ('labels', 'spans', 'named')))
    arrays, span_counts = [], []
    for number, group in enumerate(groups):
        group.check_finite(host[f'{number}.finiteness'])
        if group.dn_groups:
            pairs = denoising_pairs(group, targets.counts, known.kept)
        else:
            pairs = matcher.assign(host[f'{number}.costs'], known.kept)
        index, counts = _index(group, known.spans, *pairs)
        arrays += index
        span_counts.append(counts)
    numbers = to_device(np.concatenate([array.ravel() for array in arrays]), targets.boxes.device)
    split = numbers.split([array.size for array in arrays])
    parts = [part.view(array.shape) for part, array in zip(split, arrays)]
    matches = [
        Matches(parts[6 * i], parts[6 * i + 1], tuple(parts[6 * i + 2 : 6 * i + 6]), counts)
        for i, counts in enumerate(span_counts)
    ]
    return matches, known.num_boxes


def denoising_pairs(
    group: Group, counts: Sequence[int], kept: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The known pairs of denoising queries (DINO, sec. 3.3), in the form of the matcher's.

    In each group the first half of the queries are noised targets, in the targets' order and
    padded to the image with the most; the second half are negatives, which have no target.

    Args:
        group: The denoising queries.
        counts: Targets of each image.
        kept: Per image, the numbers of its targets that count (among all N).

    Returns:
        Images, queries and targets, int64 [L, M] each.
    """
    starts = np.arange(group.dn_groups)[:, None] * (group.num_queries // group.dn_groups)
    first = np.cumsum([0, *counts[:-1]])
    query = [(starts + rows - begin).reshape(-1) for rows, begin in zip(kept, first)]
    target = [np.tile(rows, group.dn_groups) for rows in kept]
    image = [np.full(len(rows), number) for number, rows in enumerate(target)]
    images, queries, targets = (
        np.tile(np.concatenate(index).astype(np.int64), (len(group.logits), 1))
        for index in (image, query, target)
    )
    return images, queries, targets


def _index(
    group: Group, spans: np.ndarray, image: np.ndarray, query: np.ndarray, target: np.ndarray
) -> tuple[list[np.ndarray], list[int]]:
    """The six arrays of :class:`Matches`, and how many span tokens each layer has."""
    num_layers, batch, num_queries, _ = group.logits.shape
    layer = np.broadcast_to(np.arange(num_layers)[:, None], image.shape)
    flat = (layer * batch + image) * num_queries + query
    if group.objectness:
        row, column, token = *np.indices(image.shape).reshape(2, -1), np.zeros(image.size, np.int64)
    else:
        row, column, token = np.nonzero(spans[target])
    span = [row, image[row, column], query[row, column], token]
    return [flat, target, *span], np.bincount(row, minlength=num_layers).tolist()

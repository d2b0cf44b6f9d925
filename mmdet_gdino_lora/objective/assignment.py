"""From assignments on the host to index tensors on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdet_gdino_lora.objective.targets import Targets

#: Per layer and image: numbers of the matched queries, and of their targets in that image.
Assignment = list[list[tuple[np.ndarray, np.ndarray]]]


@dataclass
class LayerMatches:
    """Matched pairs of one layer of a batch, on the device.

    Attributes:
        query: [M] numbers among all B * Q queries of the layer.
        target: [M] numbers among all targets of the batch.
        span_index: Image, query and token of every (matched query, span token): an index into
            the layer's logits.
    """

    query: Tensor
    target: Tensor
    span_index: tuple[Tensor, Tensor, Tensor]


def denoising_assignment(
    num_queries: int, num_groups: int, num_layers: int, rows: Sequence[np.ndarray]
) -> Assignment:
    """The known assignment of denoising queries (DINO, sec. 3.3).

    In each group the first half of the queries are noised targets, in the targets' order and
    padded to the image with the most; the second half are negatives, which have no target.

    Args:
        num_queries: Denoising queries of one image, in all groups.
        num_groups: Number of groups.
        num_layers: Number of decoder layers, which all have the same assignment.
        rows: Per image [N] bool, False for targets to ignore.
    """
    starts = np.arange(num_groups)[:, None] * (num_queries // num_groups)
    images = []
    for keep in rows:
        target = np.flatnonzero(keep)
        images.append(((starts + target).reshape(-1), np.tile(target, num_groups)))
    return [images] * num_layers


def layer_indices(
    layer: Sequence[tuple[np.ndarray, np.ndarray]],
    num_queries: int,
    targets: Targets,
    one_class: bool,
) -> list[np.ndarray]:
    """One layer's part of :func:`on_device`: the five arrays of :class:`LayerMatches`.

    Args:
        layer: Per image, queries and targets.
        num_queries: Queries of one image.
        targets: The batch's targets.
        one_class: The layer's only token is objectness, which every target spans.
    """
    query = np.concatenate([q for q, _ in layer])
    target = np.concatenate([t + first for (_, t), first in zip(layer, targets.first)])
    image = np.repeat(np.arange(len(layer)), [len(q) for q, _ in layer])
    if one_class:
        row, token = np.arange(len(query)), np.zeros(len(query), np.int64)
    else:
        row, token = np.nonzero(targets.host_spans[target])
    return [image * num_queries + query, target, image[row], query[row], token]


def on_device(layers: Sequence[list[np.ndarray]], device: torch.device) -> list[LayerMatches]:
    """Upload the indices of all layers together.

    Args:
        layers: Of each layer, :func:`layer_indices`.
        device: Where the predictions are.
    """
    arrays = [array for layer in layers for array in layer]
    flat = torch.from_numpy(np.concatenate(arrays).astype(np.int64, copy=False))
    parts = to_device(flat, device).split([len(array) for array in arrays])
    return [
        LayerMatches(query, target, (image, row, token))
        for query, target, image, row, token in zip(*[iter(parts)] * 5)
    ]


def to_host(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    """Numpy arrays of tensors, by one transfer (as float32) and one wait for the device."""
    if tensors[0].device.type == 'cpu':
        return [tensor.detach().numpy() for tensor in tensors]
    flat = torch.cat([tensor.detach().float().flatten() for tensor in tensors])
    if flat.is_cuda:
        staged = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=True)
        staged.copy_(flat, non_blocking=True)
        torch.cuda.current_stream(flat.device).synchronize()
    else:
        staged = flat.cpu()
    parts = staged.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).numpy() for part, tensor in zip(parts, tensors)]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Upload without waiting for the device."""
    if device.type != 'cuda':
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

"""How the objective is cut into pieces on a CPU, and only there.

A CPU is quick while the numbers of a piece stay in its cache between operations, and it may look at
the mask and at the targets' tokens at no cost, so that padding and tokens that nobody asks about
are left out. On other devices each look would make the host wait, and few large operations are
best; what is computed is the same in both ways and stands where the formulas are.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

#: Elements per piece: what one piece needs stays in the cache between operations.
BLOCK = 1 << 18

#: Below it, log(1 - p) keeps float32's digits when taken of the rounded p.
SAFE_LOGIT = 4.0


def runs_here(tensor: Tensor) -> bool:
    """Whether a tensor's operations are cut into pieces."""
    return tensor.device.type == 'cpu'


def background_blocks(
    logits: Tensor, mask: Tensor, dtype: torch.dtype
) -> Iterator[tuple[tuple, Tensor, bool]]:
    """Pieces of the logits without the padding behind each image's caption.

    Args:
        logits: [L, B, Q, C].
        mask: [B, T] bool, True for valid tokens.
        dtype: Of the pieces.

    Yields:
        The piece's index into the logits; the logits there, -inf at invalid tokens; and whether
        all of them are below :data:`SAFE_LOGIT`.
    """
    num_layers, _, num_queries, _ = logits.shape
    for image, valid in enumerate(mask):
        tokens = _valid_prefix(valid)
        holes = not bool(valid[:tokens].all())
        rows = max(1, BLOCK // max(1, tokens))
        for layer in range(num_layers):
            for start in range(0, num_queries if tokens else 0, rows):
                block = (layer, image, slice(start, start + rows), slice(0, tokens))
                x = logits[block].to(dtype)
                if holes:
                    x = x.masked_fill(~valid[:tokens], -torch.inf)
                yield block, x, float(x.amax()) < SAFE_LOGIT


def clear_padding(grad: Tensor, mask: Tensor) -> None:
    """Write zeros where :func:`background_blocks` leaves tokens out; [L, B, Q, C] and [B, T]."""
    for image, valid in enumerate(mask):
        grad[:, image, :, _valid_prefix(valid) :] = 0


def pair_blocks(counts: list[int], num_layers: int, num_queries: int) -> Iterator[tuple]:
    """Pieces of the costs [L, N, Q]: some layers of one image's targets.

    Args:
        counts: Targets of each image.
        num_layers: L.
        num_queries: Q.

    Yields:
        The image, its targets and the layers, as slices of the batch, of N and of L.
    """
    ends = np.cumsum(counts).tolist()
    for image, (count, end) in enumerate(zip(counts, ends)):
        layers = max(1, BLOCK // max(1, 4 * num_queries * count))  # four coordinates each
        for start in range(0, num_layers if count else 0, layers):
            yield slice(image, image + 1), slice(end - count, end), slice(start, start + layers)


def used_tokens(spans: Tensor) -> Tensor:
    """Tokens that any of the targets [N, T] spans."""
    return spans.any(dim=0).nonzero().squeeze(1)


def take_tokens(logits: Tensor, tokens: Tensor) -> Tensor:
    """Some tokens' columns of [l, 1, Q, C]; layer by layer, since each is contiguous."""
    return torch.stack([layer[0].index_select(1, tokens) for layer in logits])[:, None]


def _valid_prefix(valid: Tensor) -> int:
    """Number of columns up to the last True of a [T] mask."""
    indices = valid.nonzero()
    return int(indices[-1]) + 1 if len(indices) else 0

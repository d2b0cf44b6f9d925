"""Multi-head attention keeps no attention weights here, also under PEFT's adapters."""

from __future__ import annotations

from typing import Any

import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from torch import Tensor

from mmdet_gdino_lora.layers.cpu.dropout import attend
from mmdet_gdino_lora.layers.linear import adapted_linear, adapted_products
from mmdet_gdino_lora.peft_layers.attention import AttentionWeights, read_attention


class LeanMultiheadAttention(MultiheadAttention):
    """This is mmcv's ``MultiheadAttention`` on ``scaled_dot_product_attention``.

    Arguments, parameters, names and results are the same. mmcv asks torch for attention weights,
    averages them and throws them away, which keeps [batch * heads, queries, keys] numbers for the
    backward pass. Here nothing of that size is kept, the batch stays the first dimension, and
    inputs that are the same tensor are projected together.

    ``self.attn`` holds the parameters: ``nn.MultiheadAttention``, or PEFT's container around it.
    PEFT's own forward merges the adapters into the base's weights and takes them out again, for
    every call: the weights drift by rounding, are registered anew and never reach a fused kernel.
    Here the container is only read.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_pos: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend with position encodings, and add the identity.

        Args:
            query: [B, Q, C], or [Q, B, C] unless ``batch_first``; the others likewise.
            key: [B, K, C]; the query where None.
            value: [B, K, C]; the key where None.
            identity: added to the output; the query where None.
            query_pos: added to the query.
            key_pos: added to the key. Where None, ``query_pos`` is added if its shape fits, as in
                mmcv.
            attn_mask: [Q, K], [B, 1, Q, K] or [B * heads, Q, K]; bool (True: masked) or added to
                the logits.
            key_padding_mask: [B, K], True: masked.
            **kwargs: ignored, as in mmcv.

        Returns:
            The shape of ``query``.
        """
        weights = read_attention(self.attn)
        if weights is None or not _is_known(weights):
            masks = dict(attn_mask=attn_mask, key_padding_mask=key_padding_mask)
            return super().forward(
                query, key, value, identity, query_pos, key_pos, **masks, **kwargs
            )
        key = query if key is None else key
        value = key if value is None else value
        identity = query if identity is None else identity
        if key_pos is None and query_pos is not None and query_pos.shape == key.shape:
            key_pos = query_pos
        if key is query and key_pos is query_pos:
            query = key = _add(query, query_pos)
        else:
            query, key = _add(query, query_pos), _add(key, key_pos)
        if not self.batch_first:
            together = key is query, value is key
            query = query.transpose(0, 1)
            key = query if together[0] else key.transpose(0, 1)
            value = key if together[1] else value.transpose(0, 1)

        out = _attend(weights, query, key, value, attn_mask, key_padding_mask)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return identity + self.dropout_layer(self.proj_drop(out))


def _is_known(weights: AttentionWeights) -> bool:
    """Whether this is an attention whose forward is rewritten here."""
    base = weights.attention
    return base._qkv_same_embed_dim and base.bias_k is None and not base.add_zero_attn


def _attend(
    weights: AttentionWeights,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Project, attend and project out; batch first."""
    base = weights.attention
    size, heads = base.embed_dim, base.num_heads

    def project(inputs: list[Tensor], counts: list[int]) -> list[Tensor]:
        rows = [count * size for count in counts]
        packed = base.in_proj_weight, base.in_proj_bias
        outs = adapted_products(inputs, rows, *packed, weights.in_adapters)
        return [
            part.unflatten(-1, (heads, size // heads)).transpose(1, 2)
            for out, count in zip(outs, counts)
            for part in (out.split(size, dim=-1) if count > 1 else (out,))
        ]

    if query is key and key is value:
        q, k, v = project([query], [3])
    elif query is key:
        q, k, v = project([query, value], [2, 1])
    elif key is value:
        q, k, v = project([query, key], [1, 2])
    else:
        q, k, v = project([query, key, value], [1, 1, 1])

    mask = _sdpa_mask(attn_mask, key_padding_mask, len(q), q.dtype)
    out = attend(q, k, v, mask, base.dropout if base.training else 0.0)
    out = out.transpose(1, 2).flatten(2)
    out_proj = weights.out_proj
    return adapted_linear(out, out_proj.weight, out_proj.bias, weights.out_adapters)


def _add(x: Tensor, pos: Tensor | None) -> Tensor:
    return x if pos is None else x + pos


def _sdpa_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype
) -> Tensor | None:
    """Make the one mask that SDPA takes of mmcv's two: bool, True means seen there, or a bias."""
    if attn_mask is not None:
        attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.to(dtype)
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.unflatten(0, (batch, -1))
    if key_padding_mask is None:
        return attn_mask
    if key_padding_mask.dtype != torch.bool:
        padding = key_padding_mask.to(dtype)[:, None, None]
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill_(
                ~attn_mask, float('-inf')
            )
        return padding if attn_mask is None else attn_mask + padding
    seen = ~key_padding_mask[:, None, None]
    if attn_mask is None:
        return seen
    if attn_mask.dtype == torch.bool:
        return attn_mask & seen
    return attn_mask.masked_fill(~seen, float('-inf'))

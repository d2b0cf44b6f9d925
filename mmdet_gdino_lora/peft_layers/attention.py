"""PEFT's adapter for ``nn.MultiheadAttention``, read and run without writing to the frozen weights.

PEFT counts the adapter of the output projection more than once (docs/peft_out_proj.md); both ways
in here, :func:`read_attention` and :class:`FrozenMultiheadAttention`, count it as PEFT does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Optional

import torch.nn.functional as F
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from mmdet_gdino_lora.peft_layers.adapter import Adapter, active_adapters, is_plain_lora
from mmdet_gdino_lora.peft_layers.out_proj import peft_out_proj_factor


class AttentionWeights(NamedTuple):
    """What an attention module computes with now, adapted or not.

    Attributes:
        attention: The base's module, with the sizes, the dropout and the packed input projection.
        in_adapters: To be added to the packed input projection [3 * C, C].
        out_proj: The base's output projection.
        out_adapters: To be added to the output projection [C, C], PEFT's count of them included.
    """

    attention: nn.MultiheadAttention
    in_adapters: list[Adapter]
    out_proj: nn.Linear
    out_adapters: list[Adapter]


def read_attention(module: nn.Module) -> Optional[AttentionWeights]:
    """Looks into an attention module with or without PEFT's container around it.

    Args:
        module: Any module.

    Returns:
        None where it is something else than ``nn.MultiheadAttention`` with plain LoRA.
    """
    if not isinstance(module, peft_layer.MultiheadAttention):
        if not isinstance(module, nn.MultiheadAttention):
            return None
        return AttentionWeights(module, [], module.out_proj, [])
    attention = module.base_layer
    out_proj = attention.out_proj
    if not (
        isinstance(attention, nn.MultiheadAttention)
        and is_plain_lora(module)
        and is_plain_lora(out_proj)
    ):
        return None
    out_adapters = active_adapters(out_proj)
    if out_adapters:
        factor = peft_out_proj_factor()
        out_adapters = [a._replace(scaling=a.scaling * factor) for a in out_adapters]
    return AttentionWeights(attention, active_adapters(module), out_proj.base_layer, out_adapters)


class FrozenMultiheadAttention(peft_layer.MultiheadAttention):
    """As PEFT's class, names and files included; the base's weights are read and never replaced.

    PEFT 0.21 adds the adapter to the packed projection in place for every forward pass and
    subtracts it afterwards. The frozen weight drifts by rounding, and becomes a new ``Parameter``
    at every pass and at every walk over the modules, so that optimizers, DDP and fingerprints hold
    on to one that is no longer there. Here the sum is a temporary.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Optional[Tensor] = None,
        need_weights: bool = True,
        attn_mask: Optional[Tensor] = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Optional[Tensor]]:
        attention = self.get_base_layer()
        adapters = [] if self.disable_adapters else self.active_adapters
        weights = self.effective_weights([name for name in adapters if name in self.lora_A])
        sequence_first = not attention.batch_first
        if not sequence_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        output, attention_map = F.multi_head_attention_forward(
            query,
            key,
            value,
            attention.embed_dim,
            attention.num_heads,
            weights[0],
            attention.in_proj_bias,
            attention.bias_k,
            attention.bias_v,
            attention.add_zero_attn,
            attention.dropout,
            weights[1],
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return output if sequence_first else output.transpose(0, 1), attention_map

    def effective_weights(self, adapters: list[str]) -> tuple[Tensor, Tensor]:
        """Packed input projection and output projection with adapters added.

        Args:
            adapters: Names of the adapters that count.

        Returns:
            [3 * C, C] and [C, C], connected to the adapters' graph.
        """
        packed, output = self.in_proj_weight, self.out_proj.weight
        out_adapter = self.get_base_layer().out_proj
        for adapter in adapters if not self.merged else ():
            packed = packed + self.get_delta_weight(adapter).to(packed.dtype)
            delta = out_adapter.get_delta_weight(adapter) * peft_out_proj_factor()
            output = output + delta.to(output.dtype)
        return packed, output

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return nn.Module.state_dict(self, *args, **kwargs)

    def named_modules(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return nn.Module.named_modules(self, *args, **kwargs)

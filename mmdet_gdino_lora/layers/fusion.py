"""Image and text attend to each other here, and no attention weights are kept."""

from __future__ import annotations

import torch
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention, SingleScaleBiAttentionBlock
from torch import Tensor

from mmdet_gdino_lora.layers.cpu.dropout import attend


class LeanBiAttention(BiMultiHeadAttention):
    """This is mmdet's ``BiMultiHeadAttention`` on ``scaled_dot_product_attention``.

    Arguments, parameters, names and results are the same. mmdet keeps some eight tensors of
    [B * heads, positions, tokens] for the backward pass; here the logits are computed once per
    direction, block by block, and nothing of that size is kept.

    mmdet clamps the logits to +-50000, half precision's range; the kernels hold them in float32,
    and a logit beyond that bound is the only case in which the results differ.
    """

    def forward(
        self,
        vision: Tensor,
        lang: Tensor,
        attention_mask_v: Tensor | None = None,
        attention_mask_l: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Let the image look at the text, and the text at the image.

        Args:
            vision: [B, S, v_dim].
            lang: [B, T, l_dim].
            attention_mask_v: bool [B, S], True: padding, which the text doesn't see.
            attention_mask_l: bool [B, T], True: padding. The image sees it all the same: mmdet
                fills a bool mask with -9e15, which makes it True everywhere, and adds the resulting
                1 to every logit. The published weights were trained like that.

        Returns:
            What to add to the image [B, S, v_dim] and to the text [B, T, l_dim].
        """
        if attention_mask_l is not None and attention_mask_l.dtype != torch.bool:
            return super().forward(vision, lang, attention_mask_v, attention_mask_l)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

        def merged(x: Tensor) -> Tensor:
            return x.transpose(1, 2).flatten(2)

        image = heads(self.v_proj(vision))
        text = heads(self.l_proj(lang))
        image_values = heads(self.values_v_proj(vision))
        text_values = heads(self.values_l_proj(lang))
        seen = None if attention_mask_v is None else ~attention_mask_v[:, None, None]
        dropout = self.dropout if self.training else 0.0

        # The kernels' default scale is mmdet's, 1 / sqrt(head_dim).
        to_image = attend(image, text, text_values, dropout=dropout)
        to_text = attend(text, image, image_values, seen, dropout)
        return (
            self.out_v_proj(merged(to_image)),
            self.out_l_proj(merged(to_text)),
        )


class LeanFusionBlock(SingleScaleBiAttentionBlock):
    """This is mmdet's ``SingleScaleBiAttentionBlock``; it scales and adds in one operation."""

    def single_attention_call(
        self,
        visual: Tensor,
        lang: Tensor,
        attention_mask_v: Tensor | None = None,
        attention_mask_l: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Let image and text attend to each other, and add what they see.

        Args:
            visual: [B, S, v_dim].
            lang: [B, T, l_dim].
            attention_mask_v: as for `LeanBiAttention`.
            attention_mask_l: as for `LeanBiAttention`.

        Returns:
            [B, S, v_dim] and [B, T, l_dim].
        """
        masks = dict(attention_mask_v=attention_mask_v, attention_mask_l=attention_mask_l)
        if self.drop_path.training and getattr(self.drop_path, 'drop_prob', 0.0):
            return super().single_attention_call(visual, lang, **masks)
        visual, lang = self.layer_norm_v(visual), self.layer_norm_l(lang)
        delta_v, delta_l = self.attn(visual, lang, **masks)
        return _scaled(visual, self.gamma_v, delta_v), _scaled(lang, self.gamma_l, delta_l)


def _scaled(x: Tensor, gamma: Tensor, delta: Tensor) -> Tensor:
    if x.dtype == gamma.dtype == delta.dtype:
        return torch.addcmul(x, gamma, delta)
    return x + gamma * delta  # of several types, without a cast

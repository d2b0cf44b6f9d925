"""Token logits tell how similar queries and caption tokens are."""

from __future__ import annotations

import math

import torch
from mmdet.models.dense_heads.grounding_dino_head import ContrastiveEmbed
from torch import Tensor, nn

from mmdet_gdino_lora.errors import ConfigError

CHUNK = 4096
"""Positions whose logits exist at a time while proposals are scored."""


class TokenLogits(ContrastiveEmbed):
    """This is mmdet's ``ContrastiveEmbed`` for the caption's tokens alone.

    Arguments, parameters and names are the same. mmdet returns ``max_text_len`` (256) columns, -inf
    from the caption's end on; here there are T, the tokens of the longest caption in the batch,
    with -inf only where a shorter caption ends. Whoever selects queries by them must not expect
    more, as stock mmdet's detector does.
    """

    def forward(self, visual_feat: Tensor, text_feat: Tensor, text_token_mask: Tensor) -> Tensor:
        """Score every query for every token.

        Args:
            visual_feat: [B, Q, C].
            text_feat: [B, T, C].
            text_token_mask: bool [B, T], False: padding.

        Returns:
            [B, Q, T], -inf at padding.

        Raises:
            ConfigError: If the caption has more tokens than ``max_text_len``.
        """
        logits = self._logits(visual_feat, text_feat)
        return logits.masked_fill(~text_token_mask[:, None], float('-inf'))

    @torch.no_grad()
    def best(self, visual_feat: Tensor, text_feat: Tensor, text_token_mask: Tensor) -> Tensor:
        """Find the largest token logit of every position, which ranks the encoder's proposals.

        Args:
            visual_feat: [B, S, C].
            text_feat: [B, T, C].
            text_token_mask: bool [B, T].

        Returns:
            [B, S], without gradient.
        """
        padding = ~text_token_mask[:, None]
        scores = [
            self._logits(chunk, text_feat).masked_fill_(padding, float('-inf')).amax(-1)
            for chunk in visual_feat.split(CHUNK, dim=1)
        ]
        return torch.cat(scores, dim=1)

    def _logits(self, visual_feat: Tensor, text_feat: Tensor) -> Tensor:
        """Score as `forward` does, padding included: [B, Q, T]."""
        logits = self.products(visual_feat, text_feat)
        return logits if self.bias is None else logits + self.bias

    def products(self, visual_feat: Tensor, text_feat: Tensor) -> Tensor:
        """Scale and multiply: the logits [..., B, Q, T] without the bias.

        Args:
            visual_feat: [..., B, Q, C].
            text_feat: [B, T, C].
        """
        self._check_length(text_feat.shape[1])
        # The text is a few numbers beside the logits: its is the cheaper side to scale.
        if isinstance(self.log_scale, nn.Parameter):
            text_feat = text_feat * self.log_scale.exp()
        elif self.log_scale == 'auto':
            text_feat = text_feat / math.sqrt(visual_feat.shape[-1])
        return visual_feat @ text_feat.transpose(-1, -2)

    def scales_alike(self, other: TokenLogits) -> bool:
        """Whether nothing but the bias is another's."""
        own, its = self.log_scale, other.log_scale
        alike = own is its or (isinstance(own, str) and own == its)
        return alike and (self.bias is None) == (other.bias is None)

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_text_len:
            remedy = (
                f"let TokenSpans(max_tokens={self.max_text_len}, num_negatives='fit') sample them"
                if self.training
                else 'show fewer of them in a caption with model.test_cfg.chunked_size'
            )
            raise ConfigError(
                f'the caption has {tokens} tokens, more than max_text_len='
                f'{self.max_text_len} in bbox_head.contrastive_cfg; shorten the class names, or '
                f'{remedy}'
            )

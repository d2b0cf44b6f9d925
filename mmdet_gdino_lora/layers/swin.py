"""Swin's blocks checkpoint in a way that works behind frozen layers."""

from __future__ import annotations

from mmdet.models.backbones.swin import SwinBlock
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mmdet_gdino_lora.layers.checkpointing import gradient_flows


class LeanSwinBlock(SwinBlock):
    """This block is mmdet's; ``with_cp=True`` checkpoints it where a gradient flows through it.

    mmdet checkpoints in the re-entrant way, and only behind an input that needs a gradient: see
    `checkpointing.run_checkpointed` for what becomes of adapters then.
    """

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Run window attention and feed-forward, each added to its input.

        Args:
            x: [B, H * W, C].
            hw_shape: (H, W).

        Returns:
            [B, H * W, C].
        """
        if self.with_cp and gradient_flows(self, x):
            return checkpoint(self._block, x, hw_shape, use_reentrant=False)
        return self._block(x, hw_shape)

    def _block(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), hw_shape)
        return self.ffn(self.norm2(x), identity=x)

"""The feed-forward network with adapters folded into its products."""

from __future__ import annotations

from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn

from mmdet_gdino_lora.layers.linear import forward_linear


class FusedFFN(FFN):
    """mmcv's ``FFN``; adapters on its linear layers cost no passes over the hidden features.

    Same arguments, parameters, names and results.
    """

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        """Two linear layers and the identity connection.

        Args:
            x: [..., C].
            identity: added to the output where ``add_identity``; ``x`` where None.

        Returns:
            [..., C].
        """
        out = _run(self.layers, x)
        out = self.gamma2(out)
        if not self.add_identity:
            return self.dropout_layer(out)
        return (x if identity is None else identity) + self.dropout_layer(out)


def _run(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        x = _run(layer, x) if isinstance(layer, nn.Sequential) else forward_linear(layer, x)
    return x

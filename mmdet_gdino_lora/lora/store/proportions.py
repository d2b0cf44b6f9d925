"""Proportions of the encoder that other releases' code takes for granted."""

from __future__ import annotations

from mmdet.models.detectors import GroundingDINO

from mmdet_gdino_lora.errors import ConfigError


def check_proportions(detector: GroundingDINO, release: str) -> None:
    """Checks that text and fusion layers have half the encoder's widths and heads.

    Args:
        detector: Says what it has.
        release: The format to write, as ``--format`` names it.

    Raises:
        ConfigError: Something else than half.
    """
    encoder = detector.encoder
    layer, text, fusion = encoder.layers[0], encoder.text_layers[0], encoder.fusion_layers[0]
    width, heads = layer.ffn.feedforward_channels, layer.self_attn.num_heads
    halves = dict(
        text_layer_ffn=(text.ffn.feedforward_channels, width // 2),
        text_layer_heads=(text.self_attn.num_heads, heads // 2),
        fusion_width=(fusion.attn.embed_dim, width // 2),
        fusion_heads=(fusion.attn.num_heads, heads // 2),
    )
    for what, (ours, theirs) in halves.items():
        if ours != theirs:
            raise ConfigError(
                f'--format {release}: {what.replace("_", " ")} is {ours} here, and the code there '
                f"derives {theirs} from the encoder's; write --format mmdet."
            )

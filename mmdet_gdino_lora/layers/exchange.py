"""This module exchanges mmcv's, mmdet's and PEFT's layers for their lean equals."""

from __future__ import annotations

from typing import TypeVar

from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.cnn.bricks.wrappers import Linear as MmcvLinear
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock
from mmdet.models.dense_heads.grounding_dino_head import ContrastiveEmbed
from mmdet.models.layers import CdnQueryGenerator
from mmdet.models.layers.transformer.grounding_dino_layers import (
    GroundingDinoTransformerDecoder,
    GroundingDinoTransformerEncoder,
)
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention, SingleScaleBiAttentionBlock
from torch import nn

from mmdet_gdino_lora.layers.attention import LeanMultiheadAttention
from mmdet_gdino_lora.layers.contrastive import TokenLogits
from mmdet_gdino_lora.layers.decoder import LeanDecoder
from mmdet_gdino_lora.layers.deformable import LeanDeformableAttention
from mmdet_gdino_lora.layers.denoising import DenoisingQueryGenerator
from mmdet_gdino_lora.layers.encoder import LeanEncoder
from mmdet_gdino_lora.layers.frozen import LeanLinear, LeanMmcvLinear
from mmdet_gdino_lora.layers.fusion import LeanBiAttention, LeanFusionBlock
from mmdet_gdino_lora.layers.linear import LeanLoraLinear
from mmdet_gdino_lora.layers.swin import LeanShiftWindowMSA, LeanSwinBlock
from mmdet_gdino_lora.peft_layers.layers import LoraLinear

LEAN: dict[type[nn.Module], type[nn.Module]] = {
    SwinBlock: LeanSwinBlock,
    ShiftWindowMSA: LeanShiftWindowMSA,
    GroundingDinoTransformerEncoder: LeanEncoder,
    GroundingDinoTransformerDecoder: LeanDecoder,
    MultiheadAttention: LeanMultiheadAttention,
    MultiScaleDeformableAttention: LeanDeformableAttention,
    BiMultiHeadAttention: LeanBiAttention,
    SingleScaleBiAttentionBlock: LeanFusionBlock,
    LoraLinear: LeanLoraLinear,
    nn.Linear: LeanLinear,
    MmcvLinear: LeanMmcvLinear,
    ContrastiveEmbed: TokenLogits,
    CdnQueryGenerator: DenoisingQueryGenerator,
}
"""What stands in for each stock class. The last two differ in what they return, and say how."""

ModuleT = TypeVar('ModuleT', bound=nn.Module)


def exchange_layers(module: ModuleT) -> ModuleT:
    """Let a built module's layers compute the lean way.

    The layers stay the same objects with the same parameters and hooks, of a subclass that adds
    no state: names, initial weights and random numbers are exactly mmdet's. Layers of other types,
    subclasses of the known ones included, are left as they are. Layers that come later, adapters
    above all, are exchanged by another call.

    A stock detector is no place for it: its query selection expects more columns of logits than
    `TokenLogits` gives.

    Args:
        module: built from mmdet's or mmcv's classes; with or without adapters.

    Returns:
        The same module.
    """
    for name, child in list(module.named_modules()):
        if name.startswith('language_model.') and type(child) is nn.Linear:
            continue  # its features are remembered: casts of its weights would serve once
        if type(child) in LEAN:
            child.__class__ = LEAN[type(child)]
    return module

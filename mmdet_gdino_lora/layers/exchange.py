"""mmcv's and mmdet's layers replaced by their equals here."""

from __future__ import annotations

from typing import TypeVar

from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention
from torch import nn

from mmdet_gdino_lora.layers.attention import FusedMultiheadAttention
from mmdet_gdino_lora.layers.deformable import FusedDeformableAttention
from mmdet_gdino_lora.layers.fusion import FusedBiAttention
from mmdet_gdino_lora.layers.linear import FoldedLoraLinear
from mmdet_gdino_lora.peft_layers.layers import LoraLinear

FUSED: dict[type[nn.Module], type[nn.Module]] = {
    MultiheadAttention: FusedMultiheadAttention,
    MultiScaleDeformableAttention: FusedDeformableAttention,
    BiMultiHeadAttention: FusedBiAttention,
    LoraLinear: FoldedLoraLinear,
}

ModuleT = TypeVar('ModuleT', bound=nn.Module)


def fuse(module: ModuleT) -> ModuleT:
    """Let a built module's layers compute the lean way.

    The layers stay the same objects with the same parameters and hooks, of a subclass that adds
    no state: names, initial weights and random numbers are exactly mmdet's. Layers of other types,
    subclasses of the known ones included, are left as they are. Adapters put in later work; fuse
    again and they are folded, too.

    Args:
        module: built from mmdet's or mmcv's classes; with or without adapters.

    Returns:
        The same module.
    """
    for child in list(module.modules()):
        if type(child) in FUSED:
            child.__class__ = FUSED[type(child)]
    return module

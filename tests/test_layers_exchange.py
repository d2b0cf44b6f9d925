"""Exchanged layers are the same objects with the same numbers, and none is forgotten."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmcv.cnn.bricks.wrappers import Linear as MmcvLinear
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock
from mmdet.models.dense_heads.grounding_dino_head import ContrastiveEmbed
from mmdet.models.layers import CdnQueryGenerator
from mmdet.models.layers.transformer import grounding_dino_layers
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention, SingleScaleBiAttentionBlock
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from mmdet_gdino_lora.layers.encoder import LeanEncoder
from mmdet_gdino_lora.layers.exchange import LEAN, exchange_layers
from tests.builders import (
    SMALL_ENCODER,
    WORDS,
    build,
    build_cfg,
    build_stock,
    data_samples,
    detector_cfg,
)

STOCK = {
    SwinBlock,
    ShiftWindowMSA,
    grounding_dino_layers.GroundingDinoTransformerEncoder,
    grounding_dino_layers.GroundingDinoTransformerDecoder,
    MultiheadAttention,
    MultiScaleDeformableAttention,
    BiMultiHeadAttention,
    SingleScaleBiAttentionBlock,
    LoraLinear,
    nn.Linear,
    MmcvLinear,
    ContrastiveEmbed,
    CdnQueryGenerator,
}
"""What must be exchanged."""


@pytest.fixture(scope='module')
def detector(text_dir: str) -> nn.Module:
    cfg = detector_cfg(text_dir, lora=dict(preset='all', r=2))
    cfg.backbone.with_cp = True
    cfg.encoder = {**SMALL_ENCODER, 'num_cp': 1}
    return build_cfg(cfg)


def test_no_stock_layer_is_left_and_every_lean_class_has_a_user(detector: nn.Module) -> None:
    types = {
        type(module)
        for name, module in detector.named_modules()
        if not name.startswith('language_model.')  # its linear layers run once
    }
    assert not types & STOCK
    assert types >= set(LEAN.values()) and set(LEAN) == STOCK


def test_the_detector_draws_the_random_numbers_that_mmdets_own_draws(text_dir: str) -> None:
    stock = build_stock(text_dir).state_dict()
    torch.manual_seed(0)  # as before the test
    ours = build(text_dir, lora=None).state_dict()
    assert list(stock) == list(ours)
    assert [name for name in stock if not torch.equal(stock[name], ours[name])] == []


def test_exchanging_adds_no_state_and_can_be_undone(detector: nn.Module) -> None:
    stock_of = {lean: stock for stock, lean in LEAN.items()}
    undone = copy.deepcopy(detector)
    for module in undone.modules():
        module.__class__ = stock_of.get(type(module), type(module))
    before = [list(vars(module)) for module in undone.modules()]
    objects = [id(module) for module in undone.modules()]
    assert exchange_layers(undone) is undone
    assert [list(vars(module)) for module in undone.modules()] == before
    assert [id(module) for module in undone.modules()] == objects
    assert [type(m) for m in undone.modules()] == [type(m) for m in detector.modules()]


def test_somebody_elses_subclass_stays_as_it_is() -> None:
    class Mine(MultiheadAttention):
        pass

    assert type(exchange_layers(Mine(32, 4))) is Mine


def test_checkpointing_that_the_config_asks_for_arrives(detector: nn.Module) -> None:
    assert isinstance(detector.encoder, LeanEncoder) and detector.encoder.num_cp == 1
    blocks = [module for module in detector.modules() if isinstance(module, SwinBlock)]
    assert blocks and all(block.with_cp for block in blocks)


def test_our_head_works_in_mmdets_own_detector_whose_layers_stay(text_dir: str) -> None:
    cfg = detector_cfg(text_dir, type='GroundingDINO')
    cfg.pop('lora')
    stock = build_cfg(cfg).train()
    samples = data_samples(WORDS[:4], (3, 1))
    losses = stock.loss(torch.randn(2, 3, 64, 64), samples)
    assert not {type(module) for module in stock.modules()} & set(LEAN.values())
    assert all(torch.isfinite(value) for value in losses.values()) and 'loss_ce_dn' in losses

"""Fusion, token logits, proposals and checkpointing give mmdet's numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models.backbones import SwinTransformer
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock
from mmdet.models.dense_heads.grounding_dino_head import ContrastiveEmbed
from mmdet.models.detectors import DeformableDETR, GroundingDINO
from mmdet.models.utils.vlfuse_helper import BiMultiHeadAttention
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.layers.contrastive import TokenLogits
from mmdet_gdino_lora.layers.cpu.dropout import attend
from mmdet_gdino_lora.layers.exchange import exchange_layers
from mmdet_gdino_lora.layers.levels import level_tensors
from mmdet_gdino_lora.layers.proposals import select_proposals
from mmdet_gdino_lora.layers.swin import LeanShiftWindowMSA, LeanSwinBlock
from tests.builders import build, data_samples


@pytest.mark.parametrize('padded_image', [False, True])
@pytest.mark.parametrize('padded_text', [False, True])
def test_fusion_equals_mmdet(padded_image, padded_text):
    torch.manual_seed(0)
    stock = BiMultiHeadAttention(32, 24, 64, 4).eval()
    ours = exchange_layers(copy.deepcopy(stock))
    image, text = torch.randn(2, 30, 32) * 3, torch.randn(2, 7, 24) * 3
    hidden_image = torch.zeros(2, 30, dtype=torch.bool)
    hidden_image[1, 20:] = True
    hidden_text = torch.zeros(2, 7, dtype=torch.bool)
    hidden_text[0, 4:] = True
    masks = dict(
        attention_mask_v=hidden_image if padded_image else None,
        attention_mask_l=hidden_text if padded_text else None,
    )
    expected, actual = stock(image, text, **masks), ours(image, text, **masks)
    for theirs, own in zip(expected, actual):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    sum(out.sum() for out in expected).backward()
    sum(out.sum() for out in actual).backward()
    for theirs, own in zip(stock.parameters(), ours.parameters()):
        torch.testing.assert_close(own.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def test_fusion_drops_attention_in_training():
    torch.manual_seed(0)
    layer = exchange_layers(BiMultiHeadAttention(32, 24, 64, 4, dropout=0.5)).train()
    image, text = torch.randn(1, 30, 32), torch.randn(1, 7, 24)
    assert not torch.equal(layer(image, text)[0], layer(image, text)[0])


@pytest.mark.parametrize('mask', ['none', 'bool', 'additive'])
def test_attention_with_dropout_is_attention_with_dropped_weights(mask):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 40, 40))
    seen = torch.rand(2, 1, 1, 40) > 0.3
    bias = torch.zeros(seen.shape).masked_fill_(~seen, float('-inf'))
    given = dict(none=None, bool=seen, additive=bias)[mask]
    # The identity as value shows the weights; the same seed drops the same ones.
    torch.manual_seed(1)
    weights = attend(query, key, torch.eye(40).expand(2, 3, -1, -1), given, dropout=0.25)
    logits = query @ key.transpose(-1, -2) / 8**0.5 + (bias if mask != 'none' else 0)
    full = logits.softmax(-1)
    kept = weights != 0
    torch.testing.assert_close(weights, full * kept / 0.75)
    share = kept.sum() / (full != 0).sum()
    assert 0.7 < share < 0.8
    torch.manual_seed(1)
    out = attend(query, key, value, given, dropout=0.25)
    expected = (full * kept / 0.75) @ value
    torch.testing.assert_close(out, expected)
    slopes = torch.randn_like(out)
    for own, theirs in zip(
        torch.autograd.grad(out, (query, key, value), slopes),
        torch.autograd.grad(expected, (query, key, value), slopes),
    ):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)


def logits_pair(**cfg) -> tuple[nn.Module, nn.Module]:
    stock = ContrastiveEmbed(**cfg)
    ours = exchange_layers(copy.deepcopy(stock))
    assert type(ours) is TokenLogits
    return stock, ours


@pytest.mark.parametrize(
    'cfg', [{}, dict(log_scale='auto', bias=True), dict(log_scale=0.3), dict(max_text_len=7)]
)
def test_token_logits_equal_mmdet_without_its_padding_columns(cfg):
    torch.manual_seed(0)
    stock, ours = logits_pair(**cfg)
    queries, text = torch.randn(2, 9, 16), torch.randn(2, 7, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 5:] = False
    expected, actual = stock(queries, text, mask), ours(queries, text, mask)
    assert actual.shape == (2, 9, 7)
    torch.testing.assert_close(actual, expected[..., :7], rtol=1e-6, atol=1e-6)
    assert torch.equal(ours.best(queries, text, mask), actual.amax(-1))


def test_too_long_caption_is_said_in_words():
    _, ours = logits_pair(max_text_len=6)
    with pytest.raises(ConfigError, match='7 tokens.*max_text_len=6.*TokenSpans.max_tokens=6'):
        ours(torch.randn(1, 9, 16), torch.randn(1, 7, 16), torch.ones(1, 7, dtype=torch.bool))


def proposal_inputs(padded: bool) -> dict:
    torch.manual_seed(0)
    shapes, _ = level_tensors([torch.zeros(2, 1, *size) for size in ((12, 10), (6, 5), (3, 3))])
    padding = torch.zeros(2, 159, dtype=torch.bool)
    begin = 0
    for height, width in shapes.tolist():
        level = padding[1, begin : begin + height * width].view(height, width)
        level[:, width - width // 3 :] = True
        begin += height * width
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, 5:] = False
    return dict(
        memory=torch.randn(2, 159, 16),
        memory_mask=padding if padded else None,
        spatial_shapes=shapes,
        memory_text=torch.randn(2, 7, 16),
        text_token_mask=mask,
    )


@pytest.mark.parametrize('padded', [False, True])
def test_proposals_equal_mmdet(padded):
    inputs = proposal_inputs(padded)
    stock, ours = logits_pair(log_scale='auto', bias=True)
    detector = nn.Module()
    detector.memory_trans_fc, detector.memory_trans_norm = nn.Linear(16, 16), nn.LayerNorm(16)
    regress = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    memory, boxes = GroundingDINO.gen_encoder_output_proposals(
        detector, inputs['memory'], inputs['memory_mask'], inputs['spatial_shapes']
    )
    logits = stock(memory, inputs['memory_text'], inputs['text_token_mask'])
    best = logits.max(-1)[0].topk(20, dim=1)[1][..., None]
    expected_logits = logits.gather(1, best.expand(-1, -1, 256))[..., :7]
    expected_boxes = (regress(memory) + boxes).gather(1, best.expand(-1, -1, 4))
    weights = [*detector.parameters(), *regress.parameters()]

    def gradients(logits, boxes):
        return torch.autograd.grad(
            logits[logits.isfinite()].sum() + boxes.sigmoid().square().sum(), weights
        )

    actual = select_proposals(
        **inputs,
        transform=lambda x: detector.memory_trans_norm(detector.memory_trans_fc(x)),
        classify=ours,
        regress=regress,
        num_queries=20,
    )
    torch.testing.assert_close(actual.logits, expected_logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.boxes, expected_boxes, rtol=1e-5, atol=1e-5)
    for own, theirs in zip(
        gradients(actual.logits, actual.boxes), gradients(expected_logits, expected_boxes)
    ):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-4)


def test_too_few_positions_are_said_in_words():
    inputs = proposal_inputs(False)
    with pytest.raises(ConfigError, match='num_queries=900 is more than the 159 positions'):
        select_proposals(
            **inputs,
            transform=nn.Identity(),
            classify=TokenLogits(),
            regress=nn.Linear(16, 4),
            num_queries=900,
        )


def swin(with_cp: bool) -> SwinTransformer:
    torch.manual_seed(0)
    backbone = SwinTransformer(
        embed_dims=12,
        depths=[1, 2, 1, 1],
        num_heads=[1, 2, 3, 4],
        out_indices=(3,),
        with_cp=with_cp,
    )
    exchange_layers(backbone)
    backbone.train()  # returns nothing
    return backbone


def backbone_gradients(backbone: nn.Module) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients, and how many numbers were kept for them."""
    torch.manual_seed(1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        out = backbone(torch.randn(1, 3, 64, 64))[0]
    out.square().sum().backward()
    return {k: p.grad for k, p in backbone.named_parameters() if p.requires_grad}, sum(kept)


@pytest.mark.parametrize('size', [(64, 64), (52, 75)], ids=['whole windows', 'padded'])
def test_swin_equals_mmdets(size: tuple[int, int]) -> None:
    ours, stock = swin(with_cp=True), swin(with_cp=True)
    back = {LeanSwinBlock: SwinBlock, LeanShiftWindowMSA: ShiftWindowMSA}
    for module in stock.modules():
        module.__class__ = back.get(type(module), type(module))
    ours.eval(), stock.eval()  # these return nothing
    images = torch.randn(2, 3, *size)
    assert torch.equal(ours(images)[0], stock(images)[0])  # where the biases train: mmdet's way
    ours.requires_grad_(False)
    torch.testing.assert_close(ours(images), stock(images), rtol=1e-5, atol=1e-5)


def test_a_swin_block_behind_a_frozen_stem_is_checkpointed():
    block = swin(with_cp=True).stages[0].blocks[0]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = block(torch.randn(1, 256, 12), (16, 16))
    assert out.requires_grad and len(kept) <= 1


def test_swin_checkpointing_changes_no_gradient_and_keeps_less():
    (plain, all_kept), (checkpointed, kept) = (
        backbone_gradients(swin(with_cp)) for with_cp in (False, True)
    )
    assert kept < all_kept / 2
    for key, gradient in plain.items():
        torch.testing.assert_close(checkpointed[key], gradient, rtol=1e-5, atol=1e-6)


def test_swin_blocks_train_behind_a_frozen_stem():
    backbone = swin(with_cp=True)
    backbone.requires_grad_(False)
    for stage in backbone.stages:
        for block in stage.blocks:
            block.attn.w_msa.proj.requires_grad_(True)
    gradients, _ = backbone_gradients(backbone)
    assert gradients and all(gradient.abs().sum() > 0 for gradient in gradients.values())


def test_frozen_backbone_keeps_nothing():
    backbone = swin(with_cp=True)
    backbone.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pytest.fail('kept'), lambda t: t):
        assert not backbone(torch.randn(1, 3, 64, 64))[0].requires_grad


@pytest.mark.parametrize('second', [(64, 64), (40, 50)])
def test_encoder_inputs_equal_mmdet(text_dir, second):
    detector = build(text_dir, lora=None)
    nn.init.normal_(detector.level_embed)
    samples = data_samples(['dog'], [1, 1])
    samples[1].set_metainfo(dict(img_shape=second))
    feats = [torch.randn(2, 256, size, size) for size in (8, 4, 2, 1)]
    expected = DeformableDETR.pre_transformer(detector, feats, samples)
    got = detector.pre_transformer(feats, samples)
    shown = slice(None) if expected[0]['feat_mask'] is None else ~expected[0]['feat_mask']
    for inputs in (expected[0], got[0]):  # nothing looks at the padding
        inputs['feat_pos'] = inputs['feat_pos'][shown]
    for theirs, own in zip(expected, got):
        assert theirs.keys() == own.keys()
        for key, value in theirs.items():
            assert own[key] is None if value is None else torch.equal(own[key], value), key

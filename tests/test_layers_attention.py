"""Attention and linear layers give mmcv's and PEFT's numbers, and leave the weights alone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from mmdet_gdino_lora.layers.attention import LeanMultiheadAttention
from mmdet_gdino_lora.layers.exchange import exchange_layers
from tests.adapted import gradients, with_adapters


def attention_pair(**kwargs) -> tuple[nn.Module, nn.Module]:
    """mmcv's attention and ours with the same weights, in eval mode."""
    torch.manual_seed(0)
    stock = MultiheadAttention(32, 4, **{'batch_first': True, **kwargs}).eval()
    nn.init.normal_(stock.attn.in_proj_bias)
    nn.init.normal_(stock.attn.out_proj.bias)
    return stock, exchange_layers(copy.deepcopy(stock))


def masks(batch: int, queries: int, keys: int) -> dict[str, dict]:
    torch.manual_seed(3)
    hidden = torch.rand(queries, keys) > 0.6
    hidden[:, 0] = False
    per_head = torch.rand(batch * 4, queries, keys) > 0.6
    per_head[..., 0] = False
    padding = torch.zeros(batch, keys, dtype=torch.bool)
    padding[-1, keys // 2 :] = True
    return {
        'none': {},
        'shared': dict(attn_mask=hidden),
        'per head': dict(attn_mask=per_head),
        'additive': dict(attn_mask=torch.randn(queries, keys)),
        'padding': dict(key_padding_mask=padding),
        'both': dict(attn_mask=hidden, key_padding_mask=padding),
    }


@pytest.mark.parametrize('mask', ['none', 'shared', 'per head', 'additive', 'padding', 'both'])
@pytest.mark.parametrize('batch_first', [True, False])
def test_self_attention_equals_mmcv(mask, batch_first):
    stock, ours = attention_pair(batch_first=batch_first)
    x, pos = torch.randn(2, 2, 7, 32) if batch_first else torch.randn(2, 7, 2, 32)
    kwargs = dict(query_pos=pos, key_pos=pos, **masks(2, 7, 7)[mask])
    expected, actual = stock(x, x, x, **kwargs), ours(x, x, x, **kwargs)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    theirs, own = gradients(stock, expected), gradients(ours, actual)
    assert theirs.keys() == own.keys()
    for key in theirs:
        torch.testing.assert_close(own[key], theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('mask', ['none', 'per head', 'padding'])
def test_cross_attention_equals_mmcv(mask):
    stock, ours = attention_pair()
    query, pos, text = torch.randn(2, 7, 32), torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    kwargs = dict(query_pos=pos, **masks(2, 7, 5)[mask])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmcv speaks of a missing position encoding
        expected = stock(query, text, text, **kwargs)
    torch.testing.assert_close(ours(query, text, text, **kwargs), expected, rtol=1e-5, atol=1e-6)


def test_query_positions_reach_keys_of_the_same_shape_as_in_mmcv():
    stock, ours = attention_pair()
    query, pos, key = torch.randn(3, 2, 7, 32)
    expected = stock(query, key, key, query_pos=pos)
    torch.testing.assert_close(ours(query, key, key, query_pos=pos), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('fields', [{}, dict(use_rslora=True), dict(lora_dropout=0.3)])
@pytest.mark.parametrize('names', [('default',), ('first', 'second')])
def test_adapted_attention_equals_peft(fields, names):
    stock, ours = attention_pair()
    for module in (stock, ours):
        with_adapters(module, ['attn'], names, **fields)
        module.attn.set_adapter(list(names))
        module.attn.base_layer.out_proj.set_adapter(list(names))
    x, pos, text = torch.randn(2, 7, 32), torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    for key, key_pos in ((x, pos), (text, torch.zeros_like(text))):
        expected = stock.eval()(x, key, key, query_pos=pos, key_pos=key_pos)
        actual = ours.eval()(x, key, key, query_pos=pos, key_pos=key_pos)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=3e-6)


def test_adapted_attention_trains_the_adapters_as_peft_does():
    stock, ours = attention_pair()
    for module in (stock, ours):
        with_adapters(module, ['attn'])
    x = torch.randn(2, 7, 32)
    theirs, own = gradients(stock, stock(x)), gradients(ours, ours(x))
    assert theirs.keys() == own.keys() and len(own) == 4
    for key in theirs:
        # PEFT adds the output projection's delta twice and differentiates one of the two.
        factor = 2 if 'out_proj' in key else 1
        torch.testing.assert_close(own[key], factor * theirs[key], rtol=1e-4, atol=1e-5)


def test_attention_never_touches_the_weights():
    _, ours = attention_pair()
    base = with_adapters(ours, ['attn']).attn.base_layer
    weights = base.in_proj_weight, base.out_proj.base_layer.weight
    before = [(weight.clone(), weight._version) for weight in weights]
    ours(torch.randn(2, 7, 32)).sum().backward()
    assert base.in_proj_weight is weights[0] and base.out_proj.base_layer.weight is weights[1]
    for weight, (value, version) in zip(weights, before):
        assert weight._version == version and torch.equal(weight, value)


def test_disabled_and_merged_adapters_are_honoured():
    stock, ours = attention_pair()
    x = torch.randn(2, 7, 32)
    base = ours(x)
    with_adapters(ours, ['attn'])
    adapted = ours(x)
    assert (adapted - base).abs().max() > 0.01
    ours.attn.merge()
    torch.testing.assert_close(ours(x), adapted, rtol=1e-5, atol=1e-5)
    ours.attn.enable_adapters(False)
    ours.attn.base_layer.out_proj.enable_adapters(False)
    torch.testing.assert_close(ours(x), base, rtol=1e-5, atol=1e-5)


def test_fresh_adapters_change_no_bit():
    _, ours = attention_pair()
    x, text = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    base = ours(x), ours(x, text, text)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=['attn']), ours)
    adapted = ours(x), ours(x, text, text)
    assert torch.equal(base[0], adapted[0]) and torch.equal(base[1], adapted[1])


def test_adapter_dropout_acts_in_training_only():
    _, ours = attention_pair()
    with_adapters(ours, ['attn'], lora_dropout=0.5)
    x = torch.randn(2, 7, 32)
    assert torch.equal(ours.eval()(x), ours(x))
    assert not torch.equal(ours.train()(x), ours(x))


def test_attention_weights_are_dropped_in_training_only():
    _, ours = attention_pair(attn_drop=0.5)
    x = torch.randn(2, 7, 32)
    assert torch.equal(ours.eval()(x), ours(x))
    assert not torch.equal(ours.train()(x), ours(x))


def test_half_precision_keeps_small_adapters():
    _, ours = attention_pair()
    x = torch.randn(2, 7, 32)
    with_adapters(ours, ['attn'])
    exact = ours(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = ours(x)
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)


def test_attention_keeps_nothing_of_the_size_of_its_weights():
    _, ours = attention_pair()
    x = torch.randn(1, 300, 32, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours(x)
    assert max(kept) < 300 * 300


@pytest.mark.parametrize('fields', [{}, dict(use_dora=True), dict(lora_bias=True)])
def test_adapted_linear_layers_equal_peft(fields):
    torch.manual_seed(0)
    stock = FFN(32, 64).eval()
    ours = copy.deepcopy(stock)
    x = torch.randn(2, 7, 32)
    for module in (stock, ours):
        with_adapters(module, ['layers.0.0', 'layers.1'], **fields)
    exchange_layers(ours)
    expected, actual = stock(x, x), ours(x, x)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    theirs, own = gradients(stock, expected), gradients(ours, actual)
    assert theirs.keys() == own.keys() and len(own) >= 4
    for key in theirs:
        torch.testing.assert_close(own[key], theirs[key], rtol=1e-4, atol=1e-5)


def test_freed_base_weights_get_their_gradient_beside_an_adapter():
    torch.manual_seed(0)
    stock = FFN(32, 64).eval()
    ours = copy.deepcopy(stock)
    x = torch.randn(2, 7, 32)
    for module in (stock, ours):
        with_adapters(module, ['layers.1'])
        module.requires_grad_(True)
    exchange_layers(ours)
    theirs, own = gradients(stock, stock(x)), gradients(ours, ours(x))
    assert theirs.keys() == own.keys()
    for key in theirs:
        torch.testing.assert_close(own[key], theirs[key], rtol=1e-4, atol=1e-5)


def test_names_and_initial_weights_are_mmcvs():
    torch.manual_seed(0)
    stock = MultiheadAttention(32, 4)
    torch.manual_seed(0)
    ours = LeanMultiheadAttention(32, 4)
    assert list(stock.state_dict()) == list(ours.state_dict())
    for a, b in zip(stock.parameters(), ours.parameters()):
        assert torch.equal(a, b)

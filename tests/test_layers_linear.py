"""Adapted linear layers in half precision keep their input once, and PEFT's numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn

from mmdet_gdino_lora.layers.exchange import exchange_layers
from mmdet_gdino_lora.layers.linear import LeanLoraLinear
from mmdet_gdino_lora.layers.precision import cast_frozen
from tests.adapted import gradients, with_adapters

WIDTH, HIDDEN, RANK, ROWS = 64, 256, 4, 500


def adapted_ffn(names: tuple[str, ...] = ('default',), dropout: float = 0.0) -> nn.Module:
    """mmcv's FFN with PEFT's adapters, not exchanged."""
    torch.manual_seed(0)
    ffn = FFN(WIDTH, HIDDEN).requires_grad_(False)
    with_adapters(ffn, ['layers.0.0', 'layers.1'], names, lora_dropout=dropout)
    for layer in (ffn.layers[0][0], ffn.layers[1]):
        layer.set_adapter(list(names))
    return ffn


def kept_bytes(module: nn.Module, x: Tensor, dtype: torch.dtype) -> int:
    """What a forward pass under autocast keeps for every row of its input."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        if len(tensor) == ROWS:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autocast('cpu', dtype=dtype),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        module(x)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('given', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('names', [('default',), ('first', 'second')])
def test_an_adapted_ffn_keeps_each_input_once(
    dtype: torch.dtype, given: torch.dtype, names: tuple[str, ...]
) -> None:
    ffn = exchange_layers(adapted_ffn(names)).train()
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    x = (x * 1).to(given if given == torch.float32 else dtype)  # autocast remembers casts of leaves
    numbers = WIDTH + HIDDEN + len(names) * 2 * RANK
    assert kept_bytes(ffn, x, dtype) <= 2 * ROWS * numbers


def test_adapter_dropout_keeps_nothing_in_float32() -> None:
    ffn = exchange_layers(adapted_ffn(dropout=0.1)).train()
    x = torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    # Of each input: what dropout multiplies with, and the product; the hidden layer's also itself.
    numbers = 2 * (WIDTH + HIDDEN) + HIDDEN + 2 * RANK
    assert kept_bytes(ffn, x, torch.bfloat16) <= 2 * ROWS * numbers


def errors(module: nn.Module, x: Tensor, exact: dict[str, Tensor]) -> dict[str, float]:
    out = module(x)
    found = dict(out=out.detach(), **gradients(module, out.float()))
    assert found.keys() == exact.keys()
    return {
        name: ((found[name].float() - value).norm() / value.norm()).item()
        for name, value in exact.items()
    }


@pytest.mark.parametrize('way', ['bfloat16', 'float16', 'half base', 'half base, no autocast'])
@pytest.mark.parametrize('given', [torch.float32, torch.bfloat16])
def test_half_precision_is_as_exact_as_pefts(way: str, given: torch.dtype) -> None:
    peft = adapted_ffn().eval()
    x = torch.randn(ROWS, WIDTH).bfloat16().float()
    out = peft(x)
    exact = dict(out=out.detach(), **gradients(peft, out))
    ours = exchange_layers(copy.deepcopy(peft))
    autocast = 'no autocast' not in way
    for module in (peft, ours):
        if way == 'half base':
            cast_frozen(module, torch.bfloat16)
        elif not autocast:
            for name, parameter in module.named_parameters():
                if 'lora_' not in name:
                    parameter.data = parameter.data.bfloat16()
    dtype = torch.float16 if way == 'float16' else torch.bfloat16
    x = x.to(given if autocast else torch.bfloat16)
    with torch.autocast('cpu', dtype=dtype, enabled=autocast):
        theirs, own = errors(peft, x, exact), errors(ours, x, exact)
    for name, error in theirs.items():
        assert own[name] <= 1.3 * error + 1e-3, name
        assert own[name] < 0.05, name


def test_adapters_in_float32_see_a_half_layers_input_in_float32_without_autocast() -> None:
    torch.manual_seed(0)
    layer = with_adapters(nn.ModuleDict({'fc': nn.Linear(8, 8)}), ['fc'])
    exchange_layers(layer)
    assert isinstance(layer['fc'], LeanLoraLinear)
    layer['fc'].base_layer.bfloat16()
    out = layer['fc'](torch.randn(3, 8).bfloat16())
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize('autocast', [False, True])
def test_double_precision_stays(autocast: bool) -> None:
    ffn = exchange_layers(adapted_ffn()).double().eval()
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        out = ffn(x)
    assert out.dtype == torch.float64
    delta = {
        name: layer.base_layer.weight + layer.get_delta_weight('default')
        for name, layer in [('first', ffn.layers[0][0]), ('second', ffn.layers[1])]
    }
    hidden = (x @ delta['first'].t() + ffn.layers[0][0].base_layer.bias).relu()
    expected = x + hidden @ delta['second'].t() + ffn.layers[1].base_layer.bias
    torch.testing.assert_close(out, expected)


def test_adapter_dropout_drops_its_share_of_the_input_in_half_precision() -> None:
    torch.manual_seed(0)
    layer = with_adapters(nn.ModuleDict({'fc': nn.Linear(64, 64)}), ['fc'], lora_dropout=0.25)
    layer = exchange_layers(layer)['fc'].train()
    nn.init.zeros_(layer.base_layer.weight)
    nn.init.zeros_(layer.base_layer.bias)
    for weights in (layer.lora_A, layer.lora_B):
        nn.init.eye_(weights['default'].weight)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = layer(torch.ones(4000, 64))[:, :4]
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert out.float().mean().item() == pytest.approx(layer.scaling['default'], rel=0.02)

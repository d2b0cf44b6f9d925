"""Casts of frozen weights are remembered in training, and never outlive what they are casts of."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_gdino_lora.layers.frozen import LeanLinear, forget, remembered
from tests.builders import WORDS, build, data_samples


class Casts(TorchDispatchMode):
    """Counts casts."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name == 'aten::_to_copy'
        return function(*args, **(kwargs or {}))


@pytest.fixture
def layer() -> LeanLinear:
    forget()
    return LeanLinear(8, 8).requires_grad_(False)


X = torch.ones(3, 8, dtype=torch.bfloat16)


def run(layer: nn.Module, x: Tensor = X) -> tuple[Tensor, int]:
    """The output under autocast, and how many casts it took."""
    with torch.autocast('cpu', dtype=torch.bfloat16), remembered(), Casts() as casts:
        return layer(x), casts.count


def test_a_frozen_layer_is_cast_once(layer: LeanLinear) -> None:
    first, casts = run(layer)
    assert casts == 2
    again, casts = run(layer)
    assert casts == 0 and torch.equal(first, again)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(nn.Linear.forward(layer, X), first)


def test_only_training_remembers(layer: LeanLinear) -> None:
    for _ in range(2):
        with torch.autocast('cpu', dtype=torch.bfloat16), Casts() as casts:
            layer(X)
        assert casts.count == 2


def test_a_weight_that_trains_is_never_remembered(layer: LeanLinear) -> None:
    layer.requires_grad_(True)
    run(layer)
    out, casts = run(layer)
    assert casts == 2 and out.requires_grad


@pytest.mark.parametrize('change', ['written', 'replaced', 'other type', 'moved'])
def test_a_changed_weight_is_cast_anew(layer: LeanLinear, change: str) -> None:
    run(layer)
    dtype = torch.bfloat16
    if change == 'written':
        with torch.no_grad():
            layer.weight.copy_(torch.eye(8))
            layer.bias.zero_()
    elif change == 'replaced':
        layer.weight = nn.Parameter(torch.eye(8), requires_grad=False)
        layer.bias = nn.Parameter(torch.zeros(8), requires_grad=False)
    elif change == 'moved':
        layer.weight.data, layer.bias.data = torch.eye(8), torch.zeros(8)
    else:
        dtype = torch.float16
    with torch.autocast('cpu', dtype=dtype), remembered():
        out = layer(X.to(dtype))
    assert out.dtype == dtype
    assert change == 'other type' or torch.equal(out, X)


def test_a_cast_made_in_inference_mode_serves_training(layer: LeanLinear) -> None:
    with torch.inference_mode():
        run(layer)
    x = X.clone().requires_grad_()
    out, casts = run(layer, x)
    out.sum().backward()
    assert casts == 0 and x.grad is not None


def test_copies_and_files_hold_nothing_of_it(layer: LeanLinear) -> None:
    before = len(pickle.dumps(layer))
    run(layer)
    assert len(pickle.dumps(layer)) == before
    _, casts = run(copy.deepcopy(layer))
    assert casts == 2


def test_a_detectors_second_step_casts_no_frozen_weight(text_dir: str) -> None:
    detector = build(text_dir, dn_cfg=None).train()
    frozen = {p.data_ptr() for p in detector.parameters() if not p.requires_grad}
    seen: list[int] = []

    class Weights(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function._schema.name == 'aten::_to_copy' and args[0].data_ptr() in frozen:
                seen.append(args[0].dim())
            return function(*args, **(kwargs or {}))

    batch = torch.randn(1, 3, 64, 64), data_samples(WORDS[:4], (2,))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        detector.loss(*batch)
        with Weights():
            detector.loss(*batch)
        assert seen.count(2) == 0
        detector.eval().train()  # validation needs the memory
        with Weights():
            detector.loss(*batch)
    assert seen.count(2) > 20

"""Trained factors cast together for autocast train as if each had been cast alone."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_gdino_lora.layers.factors import cast_factor, cast_together
from tests.builders import WORDS, build, data_samples


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name.removeprefix('aten::'))
        return function(*args, **(kwargs or {}))


def factors() -> list[torch.Tensor]:
    return [torch.randn(4, 8, requires_grad=True) for _ in range(5)]


def test_one_operation_casts_all_and_one_their_gradients() -> None:
    given = factors()
    with torch.autocast('cpu', dtype=torch.bfloat16), cast_together(given):
        casts = [cast_factor(factor) for factor in given]
    for factor, cast in zip(given, casts):
        assert cast.dtype == torch.bfloat16 and torch.equal(cast, factor.bfloat16())
    total = sum((k * cast).sum() for k, cast in enumerate(casts[:4]))
    with Operations() as backward:
        total.backward()
    assert backward.names.count('_foreach_copy_') == 1 and '_to_copy' not in backward.names
    for k, factor in enumerate(given[:4]):
        assert torch.equal(factor.grad, torch.full_like(factor, k))
    assert given[4].grad is None  # not part of the loss: nothing is made up


@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_outside_and_without_autocast_a_factor_is_itself(dtype: torch.dtype | None) -> None:
    given = factors()
    with torch.autocast('cpu', dtype=dtype, enabled=dtype is not None), cast_together(given):
        assert (cast_factor(given[0]) is given[0]) == (dtype is None)
        other = torch.randn(3)
        assert cast_factor(other) is other
    assert cast_factor(given[0]) is given[0]


def test_a_detectors_gradients_are_those_of_factors_cast_alone(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base, dn_cfg=None).train()
    found = []
    for together in (True, False):
        if not together:
            detector._factors = []
        with torch.autocast('cpu', dtype=torch.bfloat16):
            losses = detector.loss(torch.ones(1, 3, 64, 64), data_samples(WORDS[:4], (2,)))
        detector.parse_losses(losses)[0].backward()
        found.append({n: p.grad for n, p in detector.named_parameters() if p.grad is not None})
        detector.zero_grad()
    assert found[0].keys() == found[1].keys() and len(found[0]) > 40
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name

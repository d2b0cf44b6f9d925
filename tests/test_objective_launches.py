"""How many operations the objective asks of a device: each of them is a kernel launch there."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmdet_gdino_lora.objective import build_criterion, cpu
from tests.objective import draw

#: Operations of one step's objective with six decoder layers, the encoder and two images.
CEILING = dict(
    plain=dict(forward=230, backward=85),
    denoising=dict(forward=265, backward=90),
)

#: They describe or reserve memory, or make a scalar on the host.
FREE = {
    '_unsafe_view',
    'alias',
    'detach',
    'empty',
    'empty_like',
    'lift_fresh',
    'new_empty',
    'promote_types',
    'scalar_tensor',
}


class Launches(TorchDispatchMode):
    """Counts what would launch a kernel: every operation that is neither a view nor free."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split('::')[1]
        returns_view = any(
            alias.alias_info is not None and not alias.alias_info.is_write
            for alias in function._schema.returns
        )
        if not returns_view and name not in FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('kind', CEILING)
def test_the_objective_launches_few_kernels(kind, monkeypatch):
    monkeypatch.setattr(cpu, 'runs_here', lambda tensor: False)
    outputs, targets = draw(
        0, (4, 7), 40, 30, num_layers=6, dn_groups=3 if kind == 'denoising' else 0
    )
    layers = [*outputs.pop('aux_outputs'), outputs]
    stacked = {
        key: torch.stack([layer[key].detach() for layer in layers])
        for key in ('pred_logits', 'pred_boxes')
    }
    outputs['decoder_outputs'] = {key: value.requires_grad_() for key, value in stacked.items()}
    criterion = build_criterion(num_classes=4)
    criterion(outputs, targets)
    with Launches() as forward:
        losses = criterion(outputs, targets)
    total = torch.stack(list(losses.values())).sum()
    with Launches() as backward:
        total.backward()
    counts = dict(forward=forward.counts.total(), backward=backward.counts.total())
    for way, ceiling in CEILING[kind].items():
        assert counts[way] <= ceiling, counts

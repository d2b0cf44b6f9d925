"""How many operations the objective asks of a device: each of them is a kernel launch there."""

from __future__ import annotations

import pytest
import torch

from mmdet_gdino_lora.objective import build_criterion, cpu
from tests.launches import Launches
from tests.objective import draw

#: Operations of one step's objective with six decoder layers, the encoder and two images.
CEILING = dict(
    plain=dict(forward=230, backward=85),
    denoising=dict(forward=265, backward=90),
)


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

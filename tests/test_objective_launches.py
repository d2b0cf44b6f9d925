"""How many operations the objective asks of a device: each of them is a kernel launch there."""

from __future__ import annotations

import pytest
import torch

from mmdet_gdino_lora.objective import build_criterion
from tests.ceilings import OBJECTIVE, WAITS, check
from tests.objective import draw
from tests.virtual_device import VirtualDevice


@pytest.mark.parametrize('kind', OBJECTIVE)
def test_the_objective_launches_few_kernels(kind: str) -> None:
    groups = 3 if kind == 'denoising' else 0
    with VirtualDevice() as device:
        outputs, targets = draw(0, (4, 7), 40, 30, num_layers=6, dn_groups=groups, device='cuda')
        layers = [*outputs.pop('aux_outputs'), outputs]
        stacked = {
            key: torch.stack([layer[key].detach() for layer in layers])
            for key in ('pred_logits', 'pred_boxes')
        }
        outputs['decoder_outputs'] = {key: x.requires_grad_() for key, x in stacked.items()}
        criterion = build_criterion(num_classes=4)
        criterion(outputs, targets)
        with device.watch() as forward:
            losses = criterion(outputs, targets)
        total = torch.stack(list(losses.values())).sum()
        with device.watch() as backward:
            total.backward()
    check(forward, OBJECTIVE[kind].forward, f'{kind}, forward')
    check(backward, OBJECTIVE[kind].backward, f'{kind}, backward')
    assert len(forward.waits) <= WAITS['forward'] and backward.waits == []

"""Training with every lean layer gives the losses of training with mmdet's own."""

from __future__ import annotations

import copy

import pytest
import torch
from mmdet.models.detectors import GroundingDINO
from mmdet.models.layers import CdnQueryGenerator
from mmdet.registry import MODELS
from mmengine.config import ConfigDict

from mmdet_gdino_lora import LoRAGroundingDINO
from mmdet_gdino_lora.layers.exchange import LEAN
from tests.builders import SMALL_ENCODER, data_samples, detector_cfg

NAMES = ['red circle', 'blue circle', 'dog', 'hot dog']


class WithMmdetsSelection(LoRAGroundingDINO):
    """Query selection as in mmdet."""

    pre_decoder = GroundingDINO.pre_decoder


def with_mmdets_layers(detector: LoRAGroundingDINO) -> LoRAGroundingDINO:
    """The same detector on the classes that the lean ones stand for."""
    originals = {lean: stock for stock, lean in LEAN.items()}
    del originals[LEAN[CdnQueryGenerator]]  # mmdet's draws its noise in another order
    originals[LoRAGroundingDINO] = WithMmdetsSelection
    for module in list(detector.modules()):
        if type(module) in originals:
            module.__class__ = originals[type(module)]
    return detector


def loss_curve(detector: LoRAGroundingDINO, steps: int, dtype: torch.dtype) -> list[float]:
    torch.manual_seed(1)
    detector.to(dtype).train()
    trained = [p for p in detector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    images = torch.randn(2, 3, 64, 64).to(dtype)
    samples = data_samples(NAMES, [3, 1])
    for sample in samples:
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.to(dtype)
    curve = []
    for _ in range(steps):
        loss = sum(detector.loss(images, copy.deepcopy(samples)).values())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()
        curve.append(loss.item())
    return curve


@pytest.mark.parametrize(
    ('preset', 'steps', 'dtype', 'tolerance'),
    [
        # After 30 or 40 steps, which depends on the processor too, float32 comes to a tie in
        # matching or query selection that rounding decides, and the curves part; in float64 they
        # don't.
        ('decoder', 25, torch.float32, 1e-4),
        ('all', 50, torch.float64, 1e-6),
    ],
)
def test_loss_curve_equals_the_one_with_mmdets_layers(text_dir, preset, steps, dtype, tolerance):
    cfg = detector_cfg(text_dir, lora=dict(preset=preset, r=4))
    # Dropout would draw other numbers in other layers.
    cfg['encoder'] = copy.deepcopy(SMALL_ENCODER)
    cfg['encoder']['fusion_layer_cfg']['dropout'] = 0.0
    cfg['backbone']['drop_path_rate'] = 0.0
    torch.manual_seed(0)
    lean = MODELS.build(ConfigDict(cfg))
    lean.language_model.is_init = True
    lean.init_weights()
    plain = with_mmdets_layers(copy.deepcopy(lean))
    expected, actual = loss_curve(plain, steps, dtype), loss_curve(lean, steps, dtype)
    assert expected[-1] < 0.95 * expected[0]
    assert actual == pytest.approx(expected, rel=tolerance)

"""The criterion against two independent implementations: transformers' loss and mmdet's head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from transformers.loss.loss_grounding_dino import GroundingDinoForObjectDetectionLoss

from mmdet_gdino_lora.objective.criterion import GroundingDINOCriterion
from tests.objective import (
    assert_same,
    assert_same_gradients,
    corners,
    draw,
    leaves,
)

SETTINGS = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
SIZES = st.lists(st.integers(0, 60), min_size=1, max_size=3)
HEIGHT, WIDTH = 480, 640


def transformers_losses(outputs: dict, targets: list[dict]) -> dict:
    """transformers' components under the criterion's names; every target is its own class."""
    layers = [*outputs['aux_outputs'], outputs]
    labels = [
        dict(class_labels=torch.arange(len(target['boxes'])), boxes=target['boxes'])
        for target in targets
    ]
    mask = outputs['text_token_mask']
    config = SimpleNamespace(
        class_cost=1.0,
        bbox_cost=5.0,
        giou_cost=2.0,
        focal_alpha=0.25,
        auxiliary_loss=True,
        two_stage=True,
        bbox_loss_coefficient=5.0,
        giou_loss_coefficient=2.0,
        decoder_layers=len(layers),
    )
    # its label offset counts the current image's classes instead of the earlier images'; maps
    # of one length, here the targets of all images, make that the same
    total = sum(len(target['boxes']) for target in targets)
    rows = torch.cat([target['token_labels'][:, : mask.shape[1]] for target in targets])
    first = 0
    for label in labels:
        label['class_labels'] += first
        first += len(label['boxes'])
    label_maps = tuple(rows for _ in targets)
    # the offset is one map's length for every later image, and the maps are equal
    assert all(len(m) == total for m in label_maps)
    _, losses, _ = GroundingDinoForObjectDetectionLoss(
        outputs['pred_logits'],
        labels,
        'cpu',
        outputs['pred_boxes'],
        config,
        label_maps,
        mask[:, None].expand(-1, outputs['pred_logits'].shape[1], -1),
        outputs_class=[layer['pred_logits'] for layer in layers],
        outputs_coord=[layer['pred_boxes'] for layer in layers],
        encoder_logits=outputs['enc_outputs']['pred_logits'],
        encoder_pred_boxes=outputs['enc_outputs']['pred_boxes'],
    )
    return {name: value for name, value in losses.items() if name.startswith('loss')}


def weighted(losses: dict, weights: dict) -> torch.Tensor:
    return sum(weights[name] * value for name, value in losses.items())


def compare(outputs: dict, ours: dict, theirs: dict, weights: dict) -> None:
    inputs = leaves(outputs)
    assert_same(ours, theirs)
    mine = torch.autograd.grad(weighted(ours, weights), inputs)
    other = torch.autograd.grad(weighted(theirs, weights), inputs)
    assert_same_gradients(mine, other)


@SETTINGS
@given(seed=st.integers(0, 2**31), sizes=SIZES, num_tokens=st.integers(1, 30))
def test_equal_to_transformers(seed, sizes, num_tokens):
    outputs, targets = draw(
        seed, sizes, 64, num_tokens, num_layers=2, one_caption=True, degenerate=True
    )
    criterion = GroundingDINOCriterion(4, 2, enc_target='tokens')
    ours = criterion(outputs, targets)
    compare(outputs, ours, transformers_losses(outputs, targets), criterion.weight_dict)


COSTS = [
    dict(type='BinaryFocalLossCost', weight=2.0),
    dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
    dict(type='IoUCost', iou_mode='giou', weight=2.0),
]


@pytest.fixture(scope='module')
def mmdet_head() -> torch.nn.Module:
    return mmdet_head_of(COSTS)


def mmdet_head_of(costs: list[dict]) -> torch.nn.Module:
    return MODELS.build(
        dict(
            type='GroundingDINOHead',
            num_classes=4,
            sync_cls_avg_factor=True,
            contrastive_cfg=dict(max_text_len=256),
            loss_cls=dict(type='FocalLoss', gamma=2.0, alpha=0.25, loss_weight=1.0),
            loss_bbox=dict(type='L1Loss', loss_weight=1.0),
            loss_iou=dict(type='GIoULoss', loss_weight=1.0),
            train_cfg=dict(assigner=dict(type='HungarianAssigner', match_costs=costs)),
        )
    )


def mmdet_losses(head: torch.nn.Module, outputs: dict, targets: list[dict]) -> dict:
    """mmdet's components under the criterion's names."""
    mask = outputs['text_token_mask']
    layers = [*outputs['aux_outputs'], outputs]
    denoising = outputs['dn_outputs']

    def stacked(key: str) -> torch.Tensor:
        matching = torch.stack([layer[key] for layer in layers])
        return torch.cat((denoising[key], matching), dim=2)

    def padded(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(logits, (0, 256 - logits.shape[-1]), value=-torch.inf)

    size = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    instances = []
    for target, valid in zip(targets, mask):
        count = len(target['labels'])
        maps = torch.zeros(count, 256)
        maps[:, : target['token_labels'].shape[1]] = target['token_labels']
        instances.append(
            InstanceData(
                labels=target['labels'],
                bboxes=corners(target['boxes']) * size,
                positive_maps=maps,
                text_token_mask=torch.nn.functional.pad(valid, (0, 256 - len(valid))).expand(
                    count, -1
                ),
            )
        )
    head.text_masks = mask
    losses = head.loss_by_feat(
        padded(stacked('pred_logits')),
        stacked('pred_boxes'),
        padded(outputs['enc_outputs']['pred_logits']),
        outputs['enc_outputs']['pred_boxes'],
        instances,
        [dict(img_shape=(HEIGHT, WIDTH))] * len(targets),
        dict(
            num_denoising_queries=denoising['pred_logits'].shape[2],
            num_denoising_groups=denoising['num_groups'],
        ),
    )
    renamed = {}
    for name, value in losses.items():
        layer, name = name.split('.') if '.' in name else ('', name)
        part = {'cls': 'ce', 'bbox': 'bbox', 'iou': 'giou'}[name.split('_')[-1]]
        kind = '_enc' if 'enc' in name else '_dn' if 'dn' in name else ''
        renamed[f'loss_{part}{kind}{layer.replace("d", "_")}'] = value.squeeze()
    return renamed


@SETTINGS
@given(
    seed=st.integers(0, 2**31),
    sizes=SIZES,
    num_tokens=st.integers(1, 30),
    degenerate=st.booleans(),
)
def test_equal_to_mmdet_with_denoising(mmdet_head, seed, sizes, num_tokens, degenerate):
    outputs, targets = draw(
        seed, sizes, 64, num_tokens, num_layers=2, degenerate=degenerate, dn_groups=2
    )
    criterion = GroundingDINOCriterion(4, 2, enc_target='tokens', match_costs=COSTS)
    ours = criterion(outputs, targets)
    compare(outputs, ours, mmdet_losses(mmdet_head, outputs, targets), criterion.weight_dict)

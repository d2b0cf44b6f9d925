"""What the head takes from mmdet's configs, and what it hands to the criterion."""

from __future__ import annotations

import logging

import pytest
import torch
from mmdet.models.dense_heads import GroundingDINOHead
from mmdet.models.dense_heads.atss_vlfusion_head import convert_grounding_to_cls_scores
from mmdet.models.language_models import BertModel
from mmengine.logging import MMLogger

from mmdet_gdino_lora import GroundingDINOCriterionHead, GroundingTextEncoder, build_criterion, head
from mmdet_gdino_lora.transfer import to_device
from tests.builders import build, build_cfg, data_samples, stock_cfg

MMDETS = dict(type='FocalLoss', use_sigmoid=True, gamma=1.5, alpha=0.3, loss_weight=1.0)


def two_lines(text_dir: str, **settings):
    """A config of mmdet's with nothing but the detector's name and ``lora`` changed."""
    cfg = stock_cfg(text_dir)
    cfg.update(type='LoRAGroundingDINO', lora=dict(preset='decoder', r=4))
    cfg.bbox_head.update(settings)
    return cfg


def test_a_two_line_config_keeps_its_own_loss_weights_and_focal_constants(text_dir):
    cfg = two_lines(text_dir, loss_cls=MMDETS, loss_bbox=dict(type='L1Loss', loss_weight=3.0))
    criterion = build_cfg(cfg).bbox_head.criterion
    weights = criterion.weight_dict
    assert weights['loss_ce'] == weights['loss_ce_dn_0'] == 1.0
    assert (weights['loss_bbox'], weights['loss_giou']) == (3.0, 2.0)
    assert (criterion.focal_alpha, criterion.focal_gamma) == (0.3, 1.5)
    assert [cost.weight for cost in criterion.matcher.costs] == [2.0, 5.0, 2.0]


@pytest.mark.parametrize('as_class', [False, True], ids=['with a scope', 'as a class'])
def test_mmdets_classes_are_exchanged_however_the_config_names_them(text_dir, as_class):
    cfg = two_lines(text_dir)
    cfg.language_model.type = BertModel if as_class else 'mmdet.BertModel'
    cfg.bbox_head.type = GroundingDINOHead if as_class else 'mmdet.GroundingDINOHead'
    detector = build_cfg(cfg)
    assert isinstance(detector.language_model, GroundingTextEncoder)
    assert isinstance(detector.bbox_head, GroundingDINOCriterionHead)


def test_what_the_criterion_is_told_itself_counts_more(text_dir):
    head = dict(loss_cls=MMDETS, criterion=dict(type='GroundingDINOCriterion', ce_weight=7.0))
    criterion = build_cfg(two_lines(text_dir, **head)).bbox_head.criterion
    assert criterion.weight_dict['loss_ce'] == 7.0
    assert criterion.focal_gamma == 1.5


@pytest.mark.parametrize(
    'loss, told',
    [
        (dict(loss_cls=dict(MMDETS, bg_cls_weight=0.1)), 'loss_cls.bg_cls_weight=0.1'),
        (dict(loss_cls=dict(type='QualityFocalLoss')), "loss_cls.type='QualityFocalLoss'"),
        (dict(loss_iou=dict(type='IoULoss', loss_weight=9.0)), "loss_iou.type='IoULoss'"),
    ],
)
def test_what_the_objective_does_not_take_is_told_in_one_line(text_dir, loss, told):
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = MMLogger.get_current_instance()
    logger.addHandler(handler)
    try:
        criterion = build_cfg(two_lines(text_dir, **loss)).bbox_head.criterion
    finally:
        logger.removeHandler(handler)
    (line,) = [line for line in lines if 'is not used' in line]
    assert told in line and 'bbox_head.criterion' in line
    assert criterion.weight_dict['loss_giou'] == 2.0


def test_the_project_own_configs_keep_the_papers_weights(text_dir):
    criterion = build(text_dir).bbox_head.criterion
    assert criterion.weight_dict == build_criterion(1, 3).weight_dict


def test_boxes_whose_class_the_caption_lacks_stop_training_by_name(text_dir):
    detector = build(text_dir, dn_cfg=None).train()
    samples = data_samples(['dog', 'cat'], [2, 3], seed=1)
    captions = detector.captions(samples)
    detector.token_targets.attach(samples, captions, torch.ones(2, captions[0].num_tokens).bool())
    samples[1].gt_instances.positive_maps[1] = 0
    label = int(samples[1].gt_instances.labels[1])
    with pytest.raises(ValueError, match=rf'image 1 .* 1 boxes .*label {label}.*TokenSpans'):
        detector.bbox_head.criterion(
            dict(
                pred_logits=torch.randn(2, 9, captions[0].num_tokens),
                pred_boxes=torch.rand(2, 9, 4),
                text_token_mask=torch.ones(2, captions[0].num_tokens).bool(),
            ),
            detector.bbox_head.targets(samples),
        )


def test_the_criterion_gets_every_layer_and_the_encoder(text_dir, monkeypatch):
    detector = build(text_dir).train()
    seen = []
    criterion = detector.bbox_head.criterion
    forward = criterion.forward
    monkeypatch.setattr(criterion, 'forward', lambda o, t: seen.append((o, t)) or forward(o, t))
    losses = detector.loss(torch.rand(2, 3, 64, 64), data_samples(['dog', 'cat'], [2, 3]))
    ((outputs, targets),) = seen
    layers = [*outputs['aux_outputs'], outputs]
    assert len(layers) == 3 and 'enc_outputs' in outputs and 'dn_outputs' in outputs
    for key in ('pred_logits', 'pred_boxes'):
        assert torch.equal(
            torch.stack([layer[key] for layer in layers]), outputs['decoder_outputs'][key]
        )
    plain = {key: value for key, value in outputs.items() if key != 'decoder_outputs'}
    for name, value in forward(plain, targets).items():
        torch.testing.assert_close(losses[name], value * criterion.weight_dict[name])


def test_without_lora_alpha_the_adapter_is_as_strong_as_in_the_shipped_config(text_dir):
    for rank in (4, 16):
        cfg = two_lines(text_dir)
        cfg.lora = dict(preset='decoder', r=rank)
        layer = build_cfg(cfg).decoder.layers[0].ffn.layers[1]
        assert layer.scaling == {'default': 2.0}


def test_multipliers_of_the_config_that_slow_adapters_are_told_once(text_dir, monkeypatch):
    detector = build(text_dir, lora=dict(preset='backbone+decoder', r=4), dn_cfg=None).train()
    keys = {'backbone': dict(lr_mult=0.1), 'language_model': dict(lr_mult=0.1)}
    run = dict(optim_wrapper=dict(paramwise_cfg=dict(custom_keys=keys)))
    monkeypatch.setattr('mmdet_gdino_lora.detector.runner_config', lambda: run)
    lines = []
    monkeypatch.setattr(
        MMLogger.get_current_instance(), 'warning', lambda text, *args: lines.append(text % args)
    )
    for _ in range(2):
        detector.loss(torch.rand(2, 3, 64, 64), data_samples(['dog', 'cat'], [2, 3]))
    (line,) = lines
    names = [name for name, p in detector.named_parameters() if p.requires_grad]
    count = sum('backbone' in name and '.lora_' in name for name in names)
    assert f"'backbone' (lr_mult=0.1) holds {count} adapter weights" in line and count > 10
    assert 'language_model' not in line


@pytest.mark.parametrize('spans', [[[1], [2, 3], [5, 6, 7]], [[4]], [[0, 1], [1, 2]], []])
def test_a_class_scores_what_it_does_in_mmdet(spans):
    tokens = torch.rand(7, 9)
    maps = dict(enumerate(spans, 1))
    expected = convert_grounding_to_cls_scores(tokens[None], [maps])[0]
    torch.testing.assert_close(head.class_scores(tokens, spans), expected)


@pytest.mark.parametrize('classes', [2, 40])
def test_classes_are_no_uploads_of_their_own(text_dir, monkeypatch, classes):
    uploads = []
    monkeypatch.setattr(head, 'to_device', lambda data, d: uploads.append(0) or to_device(data, d))
    maps = {number + 1: [number] for number in range(classes)}
    meta = dict(img_shape=(80, 100), scale_factor=(2.0, 4.0))
    made = build(text_dir).bbox_head._predict_by_feat_single(
        torch.randn(30, 64), torch.rand(30, 4), maps, meta
    )
    assert len(uploads) == 3
    assert made.bboxes[:, 0::2].max() <= 50 and made.bboxes[:, 1::2].max() <= 20
    assert made.bboxes.min() >= 0 and made.labels.max() < classes and len(made) == 30

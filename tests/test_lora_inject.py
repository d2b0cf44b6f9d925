"""Adapters: where they go, what is trained, and what stays frozen."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import GROUPS, PRESETS, describe, inject, lora_state, set_frozen_eval
from mmdet_gdino_lora.lora.inject.presets import (
    adaptable_modules,
    as_pattern,
    group_of,
    parse_preset,
)
from mmdet_gdino_lora.lora.state import Base
from tests.builders import build_stock, stock_cfg


@pytest.fixture(scope='module')
def _detector(text_dir: str) -> nn.Module:
    return build_stock(text_dir)


@pytest.fixture
def detector(_detector: nn.Module) -> nn.Module:
    return copy.deepcopy(_detector)


@pytest.mark.parametrize('preset', PRESETS)
def test_a_preset_adapts_its_group_and_freezes_the_rest(detector: nn.Module, preset: str) -> None:
    report = inject(detector, dict(preset=preset, r=2), train_box_head=False)
    groups = GROUPS if preset == 'all' else {preset}
    assert {group_of(name) for name in report.targets} == set(groups)
    for name, parameter in detector.named_parameters():
        adapter = '.lora_' in name
        assert parameter.requires_grad == (adapter or 'label_embedding' in name), name
        assert not adapter or group_of(name) in groups


def test_presets_combine_as_sum_and_as_list(detector: nn.Module) -> None:
    assert parse_preset('encoder+decoder') == parse_preset(['decoder', 'encoder'])
    inject(detector, dict(preset='encoder + decoder'))
    assert {group_of(name) for name in lora_state(detector).targets} == {'encoder', 'decoder'}


def test_the_decoder_preset_is_the_default_and_covers_all_its_attention_and_ffn(
    detector: nn.Module,
) -> None:
    targets = inject(detector, dict(r=2)).targets
    assert len(targets) == 3 * (2 + 4 + 2)
    assert 'decoder.layers.2.self_attn.attn' in targets
    assert 'decoder.layers.0.cross_attn.sampling_offsets' in targets
    assert not any(name.startswith('decoder.ref_point_head') for name in targets)


def test_backbone_stages_that_reach_no_loss_get_no_adapters(text_dir: str) -> None:
    cfg = stock_cfg(text_dir)
    backbone = {**cfg['backbone'], 'out_indices': (0, 1, 2)}
    neck = {**cfg['neck'], 'in_channels': [12, 24, 48]}
    detector = build_stock(text_dir, backbone=backbone, neck=neck)
    targets = inject(detector, dict(preset='backbone')).targets
    assert 'backbone.stages.1.downsample.reduction' in targets
    assert 'backbone.stages.2.blocks.0.attn.w_msa.qkv' in targets
    assert not any(
        name.startswith(('backbone.stages.2.downsample', 'backbone.stages.3')) for name in targets
    )


def test_resnet_is_a_backbone_too_and_its_frozen_stages_are_left_alone(text_dir: str) -> None:
    backbone = dict(
        type='ResNet', depth=18, out_indices=(1, 2, 3), frozen_stages=1, base_channels=8
    )
    neck = {**stock_cfg(text_dir)['neck'], 'in_channels': [16, 32, 64]}
    detector = build_stock(text_dir, backbone=backbone, neck=neck)
    targets = inject(copy.deepcopy(detector), dict(preset='backbone')).targets
    assert 'backbone.layer2.0.conv1' in targets and 'backbone.layer4.1.conv2' in targets
    assert not any(name.startswith(('backbone.layer1', 'backbone.conv1')) for name in targets)
    with pytest.raises(ConfigError, match='frozen_stages=1'):
        inject(detector, dict(target_modules=r'backbone\.layer1\..*'))


def test_every_trained_parameter_is_counted_in_the_table(detector: nn.Module) -> None:
    report = inject(detector, dict(preset='decoder+text', r=2))
    trained = sum(p.numel() for p in detector.parameters() if p.requires_grad)
    assert report.num_trained == trained == describe(detector).num_trained
    lines = report.table().splitlines()
    assert lines[0].split()[0] == 'group' and f'{trained:,}' in lines[-1]
    assert [line.split()[0] for line in lines[1:]] == [
        'decoder',
        'text',
        'neck_and_heads',
        'other',
        'total',
    ]


def test_patterns_free_more_parameters(detector: nn.Module) -> None:
    inject(detector, {}, trainable=[r'^neck\.', r'decoder\.norm'])
    parameters = dict(detector.named_parameters())
    assert parameters['neck.convs.0.conv.weight'].requires_grad
    assert parameters['decoder.norm.bias'].requires_grad
    assert parameters['bbox_head.reg_branches.0.0.weight'].requires_grad
    assert not parameters['encoder.layers.0.ffn.layers.1.weight'].requires_grad


def test_freed_attention_weights_stay_the_same_parameter(detector: nn.Module) -> None:
    inject(detector, {}, trainable=[r'decoder\.layers\.0\.self_attn\.attn\.in_proj_weight'])
    before = [p for p in detector.parameters() if p.requires_grad]
    list(detector.named_modules())
    detector.state_dict()
    after = [p for p in detector.parameters() if p.requires_grad]
    assert len(before) == len(after)
    assert all(a is b for a, b in zip(before, after))


def test_adapters_start_as_no_change_and_the_base_is_not_written_to(detector: nn.Module) -> None:
    plain = copy.deepcopy(detector.decoder.layers[0].self_attn)
    inject(detector, dict(r=2))
    adapted = detector.decoder.layers[0].self_attn
    query = torch.randn(2, 5, 256)
    assert torch.equal(plain(query), adapted(query))
    frozen = adapted.attn.in_proj_weight
    torch.nn.init.normal_(adapted.attn.lora_B['default'].weight)
    torch.nn.init.normal_(adapted.attn.base_layer.out_proj.lora_B['default'].weight)
    assert not torch.equal(plain(query), adapted(query))
    assert adapted.attn.in_proj_weight is frozen
    assert torch.equal(frozen, plain.attn.in_proj_weight)


def test_the_attention_adapter_means_what_it_means_to_peft(detector: nn.Module) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    stock = copy.deepcopy(detector.decoder.layers[0].self_attn)
    inject_adapter_in_model(LoraConfig(target_modules=['attn'], r=2, lora_alpha=4), stock)
    inject(detector, dict(r=2))
    ours = detector.decoder.layers[0].self_attn
    for name, parameter in ours.named_parameters():
        if 'lora_' in name:
            torch.nn.init.normal_(parameter, std=0.1)
    stock.load_state_dict(ours.state_dict())
    query = torch.randn(2, 5, 256)
    torch.testing.assert_close(stock(query), ours(query))


def test_frozen_parts_evaluate_while_adapted_parts_train(detector: nn.Module) -> None:
    inject(detector, dict(preset='decoder', lora_dropout=0.1))
    detector.train()
    set_frozen_eval(detector)
    assert not any(m.training for m in detector.language_model.modules())
    assert not any(m.training for m in detector.backbone.modules())
    assert not any(m.training for m in detector.encoder.fusion_layers.modules())
    assert detector.training and detector.decoder.layers[0].training
    layer = detector.decoder.layers[0].cross_attn.value_proj
    assert layer.lora_dropout['default'].training and not layer.base_layer.training
    detector.eval()
    set_frozen_eval(detector)
    assert not any(m.training for m in detector.modules())


def test_label_embedding_is_trained_only_where_the_base_did_not_bring_it(
    detector: nn.Module,
) -> None:
    inject(detector, {})
    assert detector.dn_query_generator.label_embedding.weight.requires_grad


@pytest.mark.parametrize(
    'variant',
    [dict(use_rslora=True), dict(r=3, lora_alpha=5), dict(rank_pattern={'ffn.layers.1': 1})],
)
def test_any_field_of_the_peft_config_is_a_config_key(detector: nn.Module, variant: dict) -> None:
    inject(detector, variant)
    config = lora_state(detector).config
    assert all(getattr(config, key) == value for key, value in variant.items())


def test_dora_works_on_linear_layers(detector: nn.Module) -> None:
    lora_state(detector).stands_on(Base('', {}))
    inject(detector, dict(use_dora=True, exclude_modules=['attn']))
    layer = detector.decoder.layers[0].ffn.layers[1]
    assert isinstance(layer, BaseTunerLayer) and layer.use_dora['default']
    plain = copy.deepcopy(layer.get_base_layer())
    x = torch.randn(3, plain.in_features)
    torch.testing.assert_close(layer(x), plain(x))


@pytest.mark.parametrize(
    ('lora', 'options', 'words'),
    [
        (dict(preset='decodr'), {}, ["did you mean 'decoder'", 'neck_and_heads']),
        (dict(rank=4), {}, ['lora.rank', 'lora_alpha']),
        (dict(r=0), {}, ['r']),
        (dict(target_modules=['layers.0.selfattn.attn']), {}, ['no module', '0.self_attn.attn']),
        (dict(target_modules=r'decoder\..*\.no_such'), {}, ['no_such']),
        (dict(target_modules=['value_proj', 'q_proj']), {}, ['q_proj']),
        (dict(target_modules=['out_proj']), {}, ['never run', 'cross_attn_text.attn']),
        (dict(target_modules=['decoder.layers.0.ffn']), {}, ['no Linear', '0.ffn.layers.1']),
        (dict(target_modules='all-linear'), {}, ["preset='all'"]),
        (dict(exclude_modules='.*'), {}, ['leave no module']),
        (dict(use_dora=True), {}, ['use_dora=True', '0.self_attn.attn', 'exclude_modules']),
        (dict(init_lora_weights='pissa'), {}, ["init_lora_weights='pissa'", 'MultiheadAttention']),
        (dict(use_dora=True, exclude_modules=['attn']), {}, ['use base_checkpoint=']),
        ({}, dict(trainable=['no.such.parameter']), ['trainable', 'no.such.parameter']),
        ({}, dict(trainable=['(']), ['regular expression']),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_with_the_remedy(
    detector: nn.Module, lora: dict, options: dict, words: list
) -> None:
    with pytest.raises(ConfigError) as error:
        inject(detector, lora, **options)
    message = str(error.value)
    assert '\n' not in message
    for word in words:
        assert word in message, message


def test_the_pattern_for_peft_matches_the_targets_and_nothing_else(detector: nn.Module) -> None:
    names = [name for name, _ in detector.named_modules()]
    adaptable = list(adaptable_modules(detector))
    for targets in [adaptable, adaptable[::2], adaptable[:1], adaptable[5:50:3]]:
        pattern = as_pattern(targets, names)
        assert [name for name in names if re.fullmatch(pattern, name)] == targets
    decoder = [n for n in adaptable if n.startswith('decoder.layers')]
    assert as_pattern(decoder, names).count('|') == 7

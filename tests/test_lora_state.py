"""What a detector's state answers: what is trained, what differs from the base."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.runner.checkpoint import load_checkpoint
from torch import Tensor, nn

import mmdet_gdino_lora
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import describe, lora_state
from tests.builders import WORDS, build, data_samples, detector_cfg
from tests.detectors import save, train

PACKAGE = Path(mmdet_gdino_lora.__file__).parent
FROZEN_STAGES = 1


@pytest.fixture(scope='module')
def trained_norms(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Settings of a detector whose neck's batch norms are trained beside the adapters."""
    torch.manual_seed(0)
    neck = {**detector_cfg(text_dir)['neck'], 'norm_cfg': dict(type='BN', requires_grad=True)}
    path = str(tmp_path_factory.mktemp('norms') / 'base.pth')
    torch.save(build(text_dir, lora=None, neck=neck).state_dict(), path)
    return dict(neck=neck, base_checkpoint=path, trainable=[r'neck\..*\.bn'])


def frozen_stages(text_dir: str) -> dict:
    return {**detector_cfg(text_dir)['backbone'], 'frozen_stages': FROZEN_STAGES}


def test_the_table_tells_what_is_trained_once_training_has_begun(text_dir: str, base: str) -> None:
    detector = build(
        text_dir,
        base_checkpoint=base,
        backbone=frozen_stages(text_dir),
        trainable=['^backbone'],
    )
    told = describe(detector).trained
    detector.train()
    assert set(told) == {name.replace('.base_layer.', '.') for name in trained_names(detector)}
    assert not any(name.startswith('backbone.patch_embed') for name in told)
    assert any(name.startswith('backbone.stages.2') for name in told)


def trained_names(detector: nn.Module) -> set[str]:
    return {name for name, p in detector.named_parameters() if p.requires_grad}


def test_a_pattern_that_the_backbone_freezes_again_is_told(text_dir: str) -> None:
    with pytest.raises(ConfigError, match='patch_embed.*frozen_stages'):
        build(text_dir, backbone=frozen_stages(text_dir), trainable=['backbone.patch_embed'])


def test_a_copy_for_averaging_saves_what_is_trained(text_dir: str, trained_norms: dict) -> None:
    detector = build(text_dir, **trained_norms)
    averaged = copy.deepcopy(detector).requires_grad_(False)  # as mmengine's AveragedModel
    names = set(averaged.state_dict())
    assert names == set(detector.state_dict())
    assert {'bbox_head.reg_branches.0.0.weight', 'neck.convs.0.bn.running_mean'} <= names
    assert describe(averaged).table() == describe(detector).table()


def test_a_copy_switches_alone(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base)
    train(detector, steps=1)
    detector.set_adapter(None)
    detector.set_adapter()
    copied = copy.deepcopy(detector)
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    copied.set_adapter(None)
    assert all(torch.equal(p, before[name]) for name, p in detector.named_parameters())
    weight = 'bbox_head.reg_branches.0.0.weight'
    assert torch.equal(copied.get_parameter(weight), torch.load(base)['state_dict'][weight])
    layer = 'decoder.layers.0.ffn.layers.1'
    assert copied.get_submodule(layer).disable_adapters
    assert not detector.get_submodule(layer).disable_adapters


def test_statistics_that_a_checkpoint_brought_stay_in_later_checkpoints(
    text_dir: str, trained_norms: dict, tmp_path: Path
) -> None:
    first = build(text_dir, **trained_norms)
    train(first, steps=1)
    second = build(text_dir, **{**trained_norms, 'trainable': []})
    load_checkpoint(second, save(first, tmp_path / 'first.pth'))
    third = build(text_dir, **{**trained_norms, 'trainable': []})
    load_checkpoint(third, save(second, tmp_path / 'second.pth'))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, third.state_dict()[name]), name


@pytest.mark.parametrize('paramwise', [None, dict(norm_decay_mult=0.0)], ids=['plain', 'paramwise'])
def test_frozen_parameters_have_no_state_in_the_optimizer_and_never_move(
    text_dir: str, base: str, paramwise: dict | None
) -> None:
    detector = build(text_dir, base_checkpoint=base, dn_cfg=None).train()
    before = {name: p.detach().clone() for name, p in detector.named_parameters()}
    shipped = Config.fromfile(str(PACKAGE.parent / 'configs/gdino_lora_coco.py')).optim_wrapper
    wrapper = build_optim_wrapper(detector, {**shipped, 'paramwise_cfg': paramwise})
    losses = detector.loss(torch.randn(1, 3, 48, 48), data_samples(WORDS[:4], [2], size=48))
    wrapper.update_params(sum(losses.values()))
    trained = trained_names(detector)
    parameters = dict(detector.named_parameters())
    moments = set(wrapper.optimizer.state)
    assert {name for name, p in parameters.items() if p in moments} <= trained
    moved = {name for name, p in parameters.items() if not torch.equal(p, before[name])}
    assert moved and moved <= trained


def test_initialisation_leaves_the_adapters_alone(text_dir: str) -> None:
    detector = build(text_dir)
    before = factors(detector)
    detector.init_weights()  # mmdet's runs Xavier over every matrix of encoder and decoder
    after = factors(detector)
    assert before and all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert not any(tensor.any() for name, tensor in after.items() if '.lora_B.' in name)


def factors(detector: nn.Module) -> dict[str, Tensor]:
    named = detector.named_parameters()
    return {name: p.detach().clone() for name, p in named if '.lora_' in name}


def test_nobody_but_the_state_writes_into_it() -> None:
    fields = set(vars(lora_state(nn.Module()))) | {'changed', 'trained', 'config', 'targets'}
    write = re.compile(rf'state(\(\w+\))?\.({"|".join(fields)})(\.update\(|\[.*\] = | = )')
    for path in PACKAGE.rglob('*.py'):
        found = write.search(path.read_text(encoding='utf-8'))
        assert found is None, f'{path}: {found.group()}'

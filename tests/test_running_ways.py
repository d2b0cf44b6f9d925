"""Ways to start a run that mmdet's own tools have as well: what is mended, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from mmdet_gdino_lora.engine.preflight import check_config
from mmdet_gdino_lora.errors import ConfigError
from tests.builders import build, data_samples
from tests.faults.smallest import model as smallest_model
from tests.faults.smallest import smallest
from tests.mistakes.typed import warnings_of_the_log
from tests.run_small import logged

MULTIPLIERS = {'language_model': dict(lr_mult=0.0), 'backbone': dict(lr_mult=0.1)}


@pytest.fixture
def described(tmp_path: Path, text_dir: str, small_base: str) -> Config:
    """A run of one epoch, as a config of mmdet's with two lines more describes it."""
    cfg = smallest(
        str(tmp_path / 'run'),
        text_dir,
        small_base,
        by_epoch=True,
        epochs=1,
        load_from=True,
        retain=None,
        checkpoint=dict(type='CheckpointHook'),
    )
    cfg.custom_hooks = []
    return cfg


def adapt_all(cfg: Config, **multipliers: Any) -> Config:
    cfg.model.lora = dict(preset='all', r=2)
    cfg.optim_wrapper.paramwise_cfg = dict(custom_keys={**MULTIPLIERS, **multipliers})
    return cfg


def test_a_multiplier_of_zero_over_adapters_stops_before_the_first_step(described: Config) -> None:
    runner = Runner.from_cfg(adapt_all(described))
    with pytest.raises(ConfigError, match=r"\['language_model'\].lr_mult=0 holds 24 ") as caught:
        runner.train()
    assert '\n' not in str(caught.value) and 'check_adapters=False' in str(caught.value)


def test_without_the_check_it_is_a_warning_and_other_multipliers_are_borne(
    described: Config,
) -> None:
    adapt_all(described).model.check_adapters = False
    with warnings_of_the_log() as told:
        Runner.from_cfg(described).build_optim_wrapper(described.optim_wrapper)
    assert len([line for line in told if 'lr_mult=0 holds' in line]) == 1
    cfg = adapt_all(described, language_model=dict(lr_mult=0.5))
    cfg.model.check_adapters = True
    Runner.from_cfg(cfg).build_optim_wrapper(cfg.optim_wrapper)


def test_a_tower_without_adapters_may_have_any_multiplier_and_its_weights_are_not_listed(
    described: Config,
) -> None:
    multipliers = {**MULTIPLIERS, 'decoder': dict(lr_mult=0.5)}
    described.optim_wrapper.paramwise_cfg = dict(custom_keys=multipliers)
    Runner.from_cfg(described).train()
    text = logged(described.work_dir)
    assert 'is skipped since' not in text
    assert 'paramwise_options' in text
    assert not MMLogger.get_current_instance().filters


def test_other_models_frozen_weights_are_listed_as_ever(described: Config) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    runner = Runner.from_cfg(described)
    runner.model = model
    described.optim_wrapper.paramwise_cfg = dict(custom_keys={'1': dict(lr_mult=0.0)})
    with warnings_of_the_log() as told:
        runner.build_optim_wrapper(described.optim_wrapper)
    assert sum('is skipped since' in line for line in told) == 2


def test_amp_without_a_gpu_is_told_where_the_optimizer_is_built(described: Config) -> None:
    described.optim_wrapper.type = 'AmpOptimWrapper'
    with pytest.raises(ConfigError, match='--amp.*needs a GPU, and torch finds none'):
        Runner.from_cfg(described).train()
    with pytest.raises(ConfigError, match='--amp.*needs a GPU'):
        check_config(described, ['train'])


@pytest.mark.parametrize('compiled', [True, dict(backend='inductor')])
def test_compiling_the_whole_step_is_refused_whoever_starts_the_run(
    described: Config, compiled: Any
) -> None:
    described.compile = compiled
    with pytest.raises(ConfigError, match='compile=.*CompileHook'):
        Runner.from_cfg(described).train()


def test_strategies_that_spread_the_weights_are_refused(described: Config) -> None:
    described.strategy = dict(type='FSDPStrategy')
    with pytest.raises(ConfigError, match="strategy.type='FSDPStrategy' spreads"):
        check_config(described, ['train'])


@pytest.mark.parametrize('where', ['load_from', 'base_checkpoint'])
def test_the_flexible_runner_writes_what_differs_from_the_base(
    described: Config, small_base: str, where: str
) -> None:
    if where == 'base_checkpoint':
        described.load_from, described.model.base_checkpoint = None, small_base
    described.env_cfg = dict(cudnn_benchmark=False)
    described.runner_type = 'FlexibleRunner'
    RUNNERS.build(described).train()
    written = torch.load(f'{described.work_dir}/epoch_1.pth', weights_only=False)['state_dict']
    assert 'level_embed' not in written
    trained = {name for name in written if '.lora_' not in name}
    assert trained and all(name.startswith(('bbox_head.reg', 'dn_query')) for name in trained)


def test_label_names_have_no_blank_at_the_end(text_dir: str, small_base: str) -> None:
    detector = build(text_dir, base_checkpoint=small_base, **smallest_model()).eval()
    samples = data_samples(['dog (old)', ' hot dog '], [1], size=32)
    with torch.no_grad():
        (found,) = detector.predict(torch.ones(1, 3, 32, 32), samples)
    assert set(found.pred_instances.label_names) <= {'dog', 'hot dog'}

"""mmengine's ways of training: gradient accumulation, and torch.compile of the image tower."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from torch import Tensor, nn

from mmdet_gdino_lora import CompileHook
from mmdet_gdino_lora.engine.preflight import check_config
from mmdet_gdino_lora.errors import ConfigError
from tests.builders import WORDS, build, data_samples
from tests.run_small import run


@pytest.fixture(autouse=True)
def _compiles_anew() -> None:
    """What is compiled for one size of images is compiled for any when it meets a second one."""
    torch._dynamo.reset()


def detector(text_dir: str, base: str, **overrides) -> nn.Module:
    return build(text_dir, base_checkpoint=base, dn_cfg=None, **overrides).train()


def batch(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 255, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    return dict(inputs=list(images), data_samples=data_samples(WORDS[:4], [3, 1], seed=seed))


def gradients(model: nn.Module, data: dict) -> dict[str, Tensor]:
    data = model.data_preprocessor(copy.deepcopy(data), True)
    torch.manual_seed(0)  # of the fusion layers' dropout
    model.zero_grad()
    sum(model(**data, mode='loss').values()).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def test_accumulated_gradients_are_the_mean_of_the_batches(text_dir: str, base: str) -> None:
    model = detector(text_dir, base)
    first, second = (gradients(model, batch(seed)) for seed in (1, 2))
    model.zero_grad()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    wrapper = OptimWrapper(torch.optim.SGD(trained.values(), lr=0.5), accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 2)
    for seed in (1, 2):
        torch.manual_seed(0)
        model.train_step(batch(seed), wrapper)
    for name, parameter in trained.items():
        step = (first[name] + second[name]) / 2 * 0.5
        torch.testing.assert_close(parameter, before[name] - step, rtol=1e-5, atol=1e-5)


def test_the_compiled_image_tower_gives_the_same_gradients(text_dir: str, base: str) -> None:
    model = detector(text_dir, base, lora=dict(preset='all', r=2))
    expected = gradients(model, batch(1))
    CompileHook(backend='aot_eager').before_run(SimpleNamespace(model=model))
    for name, gradient in gradients(model, batch(1)).items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def test_a_run_compiles_its_image_tower(text_dir: str, base: str, tmp_path: Path) -> None:
    plain = run(str(tmp_path / 'plain'), text_dir, base, by_epoch=True)
    hook = dict(type='CompileHook', backend='eager')  # gradients: the test above
    compiled = run(str(tmp_path / 'compiled'), text_dir, base, by_epoch=True, hooks=[hook])
    assert 'extract_feat' in vars(compiled.model)
    weights = compiled.model.state_dict()
    assert weights.keys() == plain.model.state_dict().keys()
    for name, weight in plain.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-3)


@pytest.mark.parametrize('setting', [True, dict(), dict(backend='inductor')])
def test_compiling_the_whole_detector_is_refused_with_the_remedy(setting) -> None:
    cfg = Config(dict(model=dict(type='LoRAGroundingDINO'), compile=setting))
    with pytest.raises(ConfigError, match=r"compile=.*type='CompileHook'"):
        check_config(cfg)
    cfg.compile = False
    check_config(cfg, stages=[])

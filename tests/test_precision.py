"""What a config asks a GPU for: bfloat16 and TF32 where there are any, by one key, and told."""

from __future__ import annotations

import logging

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.layers.precision import Precision
from mmdet_gdino_lora.shipped import config_path

CPU, GPU = torch.device('cpu'), torch.device('cuda')


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A GPU with bfloat16, or without where ``of['bfloat16']`` says so; what is switched there."""
    of: dict[str, object] = dict(bfloat16=True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: of['bfloat16'])
    monkeypatch.setattr(
        torch.cuda, 'get_device_capability', lambda device: (9 if of['bfloat16'] else 7, 0)
    )
    monkeypatch.setattr(
        torch.backends.cuda, 'enable_cudnn_sdp', lambda on: of.update(cudnn_attention=on)
    )
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield of
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    logger = MMLogger.get_current_instance()
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_gpu_with_bfloat16_is_asked_for_it_and_the_log_says_so_once(gpu, log) -> None:
    precision = Precision('auto', 'float32')
    for _ in range(2):
        precision.training(GPU)
    assert precision.mixed(GPU) == torch.bfloat16 and torch.backends.cuda.matmul.allow_tf32
    assert gpu['cudnn_attention'] is False
    assert log.text.count('model.precision=float32 switches both off') == 1


def test_an_older_gpu_computes_in_float32(gpu, log) -> None:
    gpu['bfloat16'] = False
    precision = Precision('auto', 'float32')
    precision.training(GPU)
    assert precision.mixed(GPU) is None and not torch.backends.cuda.matmul.allow_tf32
    assert 'bfloat16' not in log.text


def test_one_key_switches_it_off(gpu, log) -> None:
    precision = Precision('float32', 'float32')
    precision.training(GPU)
    assert precision.mixed(GPU) is None and not torch.backends.cuda.matmul.allow_tf32
    assert log.text == '' and gpu['cudnn_attention'] is False  # new shapes cost in float32 as well


def test_on_a_cpu_nothing_changes(gpu) -> None:
    with Precision('auto', 'float32').training(CPU):
        assert not torch.is_autocast_enabled('cpu')
    assert 'cudnn_attention' not in gpu and not torch.backends.cuda.matmul.allow_tf32


def test_predictions_run_in_the_precision_of_the_weights() -> None:
    with Precision('auto', 'float32').predicting(CPU):
        assert not torch.is_autocast_enabled('cpu')
    with Precision('auto', 'bfloat16').predicting(CPU):
        assert torch.get_autocast_dtype('cpu') == torch.bfloat16


def test_the_runners_own_precision_stays() -> None:
    with torch.autocast('cpu', dtype=torch.float16), Precision('auto', 'bfloat16').training(CPU):
        assert torch.get_autocast_dtype('cpu') == torch.float16


def test_another_name_is_refused() -> None:
    with pytest.raises(ConfigError, match="model.precision='half' is not one of auto, float32"):
        Precision('half', 'float32')


def test_the_shipped_config_asks_for_all_of_it() -> None:
    cfg = Config.fromfile(config_path('gdino_lora_coco'))
    assert cfg.model.precision == 'auto' and cfg.model.data_preprocessor.non_blocking
    assert cfg.train_dataloader.pin_memory and cfg.val_dataloader.pin_memory

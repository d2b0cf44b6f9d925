"""Settings and fixtures shared by all rooms' tests."""

from __future__ import annotations

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

import pytest
import torch
from mmdet.utils import register_all_modules

from tests.builders import THREADS, build, detector_cfg, tiny_text_model

register_all_modules(init_default_scope=True)
torch.set_num_threads(THREADS)


@pytest.fixture(scope='session')
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny text model with a vocabulary of its own."""
    return tiny_text_model(str(tmp_path_factory.mktemp('text')))


@pytest.fixture(scope='session')
def base(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base checkpoint, its weights far enough from their initial values to tell models apart."""
    detector = build(detector_cfg(text_dir, lora=None))
    detector.init_weights()
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if 'language_model' not in name:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    path = str(tmp_path_factory.mktemp('base') / 'base.pth')
    torch.save(dict(state_dict=detector.state_dict()), path)
    return path

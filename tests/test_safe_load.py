"""Our loading reads mmengine's checkpoints; what else the process loads is as strict as before."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from mmengine.runner import CheckpointLoader

import mmdet_gdino_lora  # noqa: F401  importing it is all that a user does
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.read import read_file
from mmdet_gdino_lora.files.types import mmengine_types

RECONSTRUCT = (getattr(np, '_core', None) or np.core).multiarray._reconstruct


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """What mmengine writes beside weights: log, best score, counts."""
    hub = MessageHub.get_instance('safe_load')
    for value in (1.0, 3.0):
        hub.update_scalar('train/loss', torch.tensor(value))
    hub.update_info('best_score', np.float64(0.5))
    hub.update_info('counts', np.arange(3))
    content = dict(message_hub=hub.state_dict(), meta=dict(seed=np.int64(7)))
    torch.save(content, tmp_path / 'a.pth')
    return str(tmp_path / 'a.pth')


@pytest.mark.parametrize('load', [read_file, CheckpointLoader.load_checkpoint])
def test_a_message_hub_comes_back(checkpoint: str, load: Any) -> None:
    loaded = load(checkpoint)
    buffer = loaded['message_hub']['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer)
    assert buffer.mean() == 2.0 and buffer.statistics('max') == 3.0
    assert loaded['message_hub']['runtime_info']['best_score'] == 0.5
    assert loaded['message_hub']['runtime_info']['counts'].tolist() == [0, 1, 2]
    assert loaded['meta']['seed'] == 7


def test_what_else_the_process_loads_is_as_strict_as_before(checkpoint: str) -> None:
    assert HistoryBuffer not in torch.serialization.get_safe_globals()
    for load in (read_file, CheckpointLoader.load_checkpoint):
        load(checkpoint)
        with pytest.raises(Exception, match='HistoryBuffer was not an allowed global'):
            torch.load(checkpoint, weights_only=True)


def test_what_somebody_else_allowed_stays_allowed(checkpoint: str) -> None:
    with torch.serialization.safe_globals([HistoryBuffer]):
        before = set(torch.serialization.get_safe_globals())
        with mmengine_types(), mmengine_types():
            assert set(torch.serialization.get_safe_globals()) > before
        read_file(checkpoint)
        assert set(torch.serialization.get_safe_globals()) == before


class Crafted:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    'call',
    [
        (os.system, ('true',)),
        (getattr, (HistoryBuffer, '__init__')),
        (getattr, (HistoryBuffer, 'update')),
        (getattr, (np.ndarray, 'tofile')),
        (RECONSTRUCT, (np.ndarray, (10**6,), b'b')),
    ],
)
def test_a_crafted_file_is_refused(tmp_path: Path, call: tuple) -> None:
    torch.save(dict(a=Crafted(*call)), tmp_path / 'crafted.pth')
    with pytest.raises(ConfigError, match='not ask for|[Uu]nsupported') as told:
        read_file(str(tmp_path / 'crafted.pth'))
    assert '\n' not in str(told.value) and 'trust' not in str(told.value)

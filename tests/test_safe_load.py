"""torch's safe loading reads mmengine's checkpoints, and refuses everything else as before."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub

import mmdet_gdino_lora  # noqa: F401  importing it is all that a user does


def test_a_message_hub_comes_back(tmp_path):
    hub = MessageHub.get_instance('safe_load')
    for value in (1.0, 3.0):
        hub.update_scalar('train/loss', torch.tensor(value))
    hub.update_info('best_score', np.float64(0.5))
    hub.update_info('counts', np.arange(3))
    torch.save(dict(message_hub=hub.state_dict(), meta=dict(seed=np.int64(7))), tmp_path / 'a.pth')
    loaded = torch.load(tmp_path / 'a.pth', weights_only=True)
    buffer = loaded['message_hub']['log_scalars']['train/loss']
    assert isinstance(buffer, HistoryBuffer)
    assert buffer.mean() == 2.0 and buffer.statistics('max') == 3.0
    assert loaded['message_hub']['runtime_info']['best_score'] == 0.5
    assert loaded['meta']['seed'] == 7


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
    ],
)
def test_a_crafted_file_is_refused(tmp_path, call):
    torch.save(dict(a=Crafted(*call)), tmp_path / 'crafted.pth')
    with pytest.raises(Exception, match='not ask for attribute|[Uu]nsupported|Weights only'):
        torch.load(tmp_path / 'crafted.pth', weights_only=True)

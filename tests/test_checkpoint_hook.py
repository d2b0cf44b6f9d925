"""What AdapterCheckpointHook leaves on disk, when, and beside which numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Union

import pytest
import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook
from mmengine.runner import Runner
from safetensors.torch import load_file

from mmdet_gdino_lora.files.read import read_file
from tests.run_small import run


@HOOKS.register_module(force=True)
class SeenFilesHook(Hook):
    """Remembers which checkpoints are on disk whenever another is about to be written."""

    def __init__(self) -> None:
        self.seen: list[set[str]] = []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self.seen.append({name for name in os.listdir(runner.work_dir) if name.endswith('.pth')})


def assert_same_weights(checkpoint: Path) -> None:
    """The adapter beside a checkpoint holds its very weights, box head and factors."""
    folder = checkpoint.with_name(f'{checkpoint.stem}_adapter')
    weights = load_file(folder / 'adapter_model.safetensors')
    state_dict = read_file(str(checkpoint))['state_dict']
    assert any('lora_B' in name for name in state_dict)
    for name, tensor in state_dict.items():
        peft = 'base_model.model.' + name.replace('.default', '')
        assert torch.equal(weights[peft], tensor), name


def card(folder: Path) -> str:
    return (folder / 'README.md').read_text()


def test_numbers_go_to_the_weights_that_were_measured_and_to_no_others(
    text_dir: str, base: str, tmp_path: Path
) -> None:
    run(
        str(tmp_path),
        text_dir,
        base,
        by_epoch=True,
        batch_size=4,
        epochs=4,
        scores=[0.1, 0.2, 0.3, 0.4],
        checkpoint=dict(interval=2),
    )
    folders = sorted(path.name for path in tmp_path.glob('*_adapter'))
    assert folders == ['epoch_2_adapter', 'epoch_4_adapter']
    for epoch, score in ((2, 0.2), (4, 0.4)):
        assert_same_weights(tmp_path / f'epoch_{epoch}.pth')
        assert f'| acc | {score} |' in card(tmp_path / f'epoch_{epoch}_adapter')


def test_an_adapter_that_is_not_validated_has_no_numbers(
    text_dir: str, base: str, tmp_path: Path
) -> None:
    settings = dict(by_epoch=False, batch_size=4, epochs=3, scores=[0.1, 0.2])
    run(str(tmp_path), text_dir, base, checkpoint=dict(interval=1), **settings)
    assert '| acc | 0.1 |' in card(tmp_path / 'iter_2_adapter')
    assert '| acc | 0.2 |' in card(tmp_path / 'iter_3_adapter')
    assert 'metric' not in card(tmp_path / 'iter_1_adapter')
    for iteration in (1, 2, 3):
        assert_same_weights(tmp_path / f'iter_{iteration}.pth')


@pytest.mark.parametrize('save_best', ['acc', ['acc', 'sureness']], ids=['one', 'two'])
def test_the_best_is_there_at_any_moment_with_its_adapter_and_goes_with_it(
    text_dir: str, base: str, tmp_path: Path, save_best: Union[str, list[str]]
) -> None:
    runner = run(
        str(tmp_path),
        text_dir,
        base,
        by_epoch=True,
        batch_size=4,
        epochs=3,
        scores=[0.1, 0.3, 0.2],
        checkpoint=dict(save_best=save_best, rule='greater', max_keep_ckpts=1),
        hooks=[dict(type='SeenFilesHook')],
    )
    seen = next(hook.seen for hook in runner.hooks if isinstance(hook, SeenFilesHook))
    first = next(i for i, names in enumerate(seen) if 'best_acc_epoch_1.pth' in names)
    for names in seen[first:]:
        assert any(name.startswith('best_acc_') for name in names), names
        assert any(name.startswith('epoch_') for name in names), names
    checkpoints = {path.stem for path in tmp_path.glob('*.pth')}
    assert {name for name in checkpoints if 'sureness' not in name} == {
        'best_acc_epoch_2',
        'epoch_3',
    }
    assert {path.name for path in tmp_path.glob('*_adapter')} == {
        f'{name}_adapter' for name in checkpoints
    }
    for name in checkpoints:
        assert_same_weights(tmp_path / f'{name}.pth')
    assert '| acc | 0.3 |' in card(tmp_path / 'best_acc_epoch_2_adapter')
    assert '| acc | 0.2 |' in card(tmp_path / 'epoch_3_adapter')

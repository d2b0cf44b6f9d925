"""Training on several ranks: the same gradients as one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import pytest
import torch
from mmengine.runner.checkpoint import weights_to_cpu
from torch import Tensor

from tests.builders import SMALL_ENCODER, WORDS, build
from tests.processes import as_ranks
from tests.run_small import run
from tests.run_validation import losses, validate_a_rank

# Dropout, denoising and augmentation draw numbers of their own on every rank.
FUSION = dict(SMALL_ENCODER['fusion_layer_cfg'], dropout=0.0, drop_path=0.0)
STILL = dict(flicker=1, dn_cfg=None, encoder=dict(SMALL_ENCODER, fusion_layer_cfg=FUSION))


def train(work_dir: str, text_dir: str, base: str, settings: dict[str, Any]) -> None:
    """One rank's training, which leaves its weights in the work dir."""
    runner = run(
        work_dir, text_dir, base, by_epoch=True, batch_size=1, launcher='pytorch', **settings
    )
    rank = torch.distributed.get_rank()
    torch.save(weights_to_cpu(runner.model.module.state_dict()), Path(work_dir, f'{rank}.pth'))


def ranks(work_dir: Path, text_dir: str, base: str, settings: dict[str, Any]) -> list[dict]:
    """Weights of two ranks after training on halves of every batch."""
    as_ranks(train, str(work_dir), text_dir, base, settings)
    return left_in(work_dir)


def left_in(work_dir: Path) -> list:
    """What the two ranks left in the work dir."""
    return [torch.load(work_dir / f'{rank}.pth') for rank in (0, 1)]


def change(weights: dict[str, Tensor], like: dict[str, Tensor]) -> float:
    """The largest difference between two runs' weights."""
    return max((weights[name] - like[name]).abs().max().item() for name in like)


@pytest.mark.parametrize('retain', [None, dict(names=['bird', 'car'], weight=5.0)])
def test_two_ranks_train_as_one_process_with_the_whole_batch(
    text_dir: str, base: str, tmp_path: Path, retain: Optional[dict]
) -> None:
    settings = dict(STILL, retain=retain)
    whole = run(str(tmp_path / 'whole'), text_dir, base, by_epoch=True, **settings)
    first, second = ranks(tmp_path / 'ranks', text_dir, base, settings)
    assert change(first, second) == 0
    start = {n: w for n, w in torch.load(base)['state_dict'].items() if n in first}
    trained = change(first, start)
    assert trained > 1e-3
    assert change(first, whole.model.state_dict()) < 0.02 * trained


def test_every_preset_denoising_and_a_teacher_now_and_then_keep_the_ranks_together(
    text_dir: str, base: str, tmp_path: Path
) -> None:
    settings = dict(lora=dict(preset='all', r=2), retain=dict(names=['bird', 'car'], every=2))
    first, second = ranks(tmp_path / 'ranks', text_dir, base, settings)
    assert change(first, second) == 0
    assert any(weight.any() for name, weight in first.items() if 'lora_B' in name)


def test_ranks_validate_without_waiting_for_each_other(
    text_dir: str, base: str, tmp_path: Path
) -> None:
    as_ranks(validate_a_rank, str(tmp_path), text_dir, base)
    first, second = left_in(tmp_path)
    assert second == [{}, {}]  # no ground truth, and classes of several captions
    detector = build(text_dir, base_checkpoint=base).eval()
    for found, boxes in zip(first, ([3, 1], [2])):
        expected = losses(detector, WORDS[:4], boxes)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)

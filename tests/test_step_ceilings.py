"""A training step asks no more of a GPU than the table of ceilings allows."""

from __future__ import annotations

import pytest
import torch

from tests.builders import build, write_base
from tests.ceilings import OPERATIONS, WAITS, check
from tests.virtual_device.steps import counted, full_depth

KINDS = sorted({(preset, retain) for preset, retain, _ in OPERATIONS})


@pytest.fixture(scope='module')
def deep_base(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The base of a detector as deep as the published ones."""
    torch.manual_seed(0)
    detector = build(text_dir, lora=None, **full_depth())
    return write_base(detector, str(tmp_path_factory.mktemp('deep') / 'base.pth'))


@pytest.mark.parametrize(('preset', 'retain'), KINDS)
def test_a_step_stays_below_its_ceilings(
    text_dir: str, deep_base: str, preset: str, retain: bool
) -> None:
    amps = [amp for *kind, amp in OPERATIONS if kind == [preset, retain]]
    settings = dict(retain=dict(names=['old star', 'old car'])) if retain else {}
    steps = counted(text_dir, deep_base, amps, size=128, lora=dict(preset=preset, r=4), **settings)
    for amp, step in steps.items():
        for way, ceiling in OPERATIONS[preset, retain, amp]._asdict().items():
            counts = getattr(step, way)
            check(counts, ceiling, f'{way} of {preset}, retain={retain}, {amp or "float32"}')
            assert len(counts.waits) <= WAITS[way], counts.waits

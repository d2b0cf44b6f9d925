"""The step's benchmark runs with what `make env` installs."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / 'tools' / 'benchmarks'


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The benchmark, as if fairscale were not installed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    find = importlib.util.find_spec

    def find_spec(name: str, *package: str):
        return None if name == 'fairscale' else find(name, *package)

    monkeypatch.setattr(importlib.util, 'find_spec', find_spec)
    return importlib.import_module('step')


def test_the_contender_that_needs_fairscale_is_left_out_in_one_line(step, tmp_path, capsys):
    with pytest.raises(SystemExit, match='leaves none of the contenders: mmdet, full; '):
        step.build(str(tmp_path), step.cs.Scale(), '^mmdet, full, checkpointing')
    told = capsys.readouterr().err
    assert told == 'left out: mmdet, full, checkpointing (pip install fairscale)\n'


def test_an_expression_that_names_no_contender_is_told_them(step, tmp_path):
    with pytest.raises(SystemExit, match="^error: --only 'nobody' leaves none .*; ours, all; "):
        step.build(str(tmp_path), step.cs.Scale(), 'nobody')

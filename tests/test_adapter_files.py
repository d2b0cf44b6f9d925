"""A tuned detector goes out: to PEFT's format, into the base, and back to the base."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from mmdet_gdino_lora.engine.atomic import atomic
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import GradientCheck
from mmdet_gdino_lora.lora.store.base import read_weights
from mmdet_gdino_lora.lora.store.folder import export_adapter, write_weights
from mmdet_gdino_lora.lora.store.merge import merged_weights
from tests.builders import build, build_cfg, build_stock, detector_cfg
from tests.detectors import detections, train


@pytest.fixture(scope='module')
def tuned(text_dir: str, base: str) -> nn.Module:
    lora = dict(preset='all', r=2, lora_alpha=3, rank_pattern={r'ffn\.layers\.1': 1})
    detector = build(text_dir, lora=lora, base_checkpoint=base, trainable=['neck.*gn'])
    train(detector)
    return detector.eval()


@pytest.fixture(scope='module')
def _stock(text_dir: str, base: str) -> nn.Module:
    detector = build_stock(text_dir)
    detector.load_state_dict(read_weights(base))
    return detector


@pytest.fixture
def stock(_stock: nn.Module) -> nn.Module:
    """mmdet's own detector with the base; its text encoder alone is exchanged."""
    return copy.deepcopy(_stock)


def assert_same_detections(one: nn.Module, other: nn.Module) -> None:
    (boxes, scores), (other_boxes, other_scores) = detections(one), detections(other)
    torch.testing.assert_close(scores, other_scores, rtol=0, atol=1e-5)
    torch.testing.assert_close(boxes, other_boxes, rtol=0, atol=1e-3)


def test_stock_peft_loads_the_export_onto_stock_mmdet(
    tuned: nn.Module, stock: nn.Module, tmp_path: Path
) -> None:
    metrics = {'coco/bbox_mAP': 0.5}
    export_adapter(tuned, str(tmp_path), classes=['red star', 'dog'], metrics=metrics)
    assert sorted(os.listdir(tmp_path)) == [
        'README.md',
        'adapter_config.json',
        'adapter_model.safetensors',
    ]
    before = detections(stock)
    adapted = PeftModel.from_pretrained(stock, str(tmp_path)).eval()
    assert not torch.equal(before[0], detections(adapted)[0])
    assert_same_detections(tuned, adapted)
    with adapted.disable_adapter():
        torch.testing.assert_close(before[0], detections(adapted)[0], rtol=0, atol=1e-3)


def test_the_export_is_described_for_people_and_for_peft(
    tuned: nn.Module,
    base: str,
    tmp_path: Path,
) -> None:
    export_adapter(tuned, str(tmp_path), classes=['red star', 'dog'], metrics={'AP50': 0.5})
    card = (tmp_path / 'README.md').read_text()
    for part in (os.path.basename(base), '`all`', 'r=2', 'red star, dog', '| AP50 | 0.5 |'):
        assert part in card
    config = LoraConfig.from_pretrained(str(tmp_path))
    assert (config.r, config.base_model_name_or_path) == (2, base)
    assert 'neck.convs.0.gn' in config.modules_to_save
    with safe_open(str(tmp_path / 'adapter_model.safetensors'), 'pt') as file:
        names = list(file.keys())
        record = json.loads(file.metadata()['mmdet_gdino_lora'])
    assert record['base']['source'] == base and set(record['base']['fingerprint']) > {'encoder'}
    assert not any('label_embedding' in name for name in names)


def test_what_peft_has_no_place_for_is_refused_with_the_way_out(
    text_dir: str,
    base: str,
    tmp_path: Path,
) -> None:
    detector = build(text_dir, base_checkpoint=base, trainable=['^level_embed'])
    with pytest.raises(ConfigError, match='level_embed.*merge_adapter'):
        export_adapter(detector, str(tmp_path / 'out'))
    assert not (tmp_path / 'out').exists()


def test_merged_at_one_stock_mmdet_detects_as_the_tuned_detector(
    tuned: nn.Module, stock: nn.Module, tmp_path: Path
) -> None:
    path = str(tmp_path / 'merged.pth')
    before = {name: tensor.clone() for name, tensor in tuned.named_parameters()}
    write_weights(path, merged_weights(tuned), dict(note='x'))
    result = stock.load_state_dict(read_weights(path))
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_detections(tuned, stock)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tuned.named_parameters())


def test_merged_at_zero_is_the_base_and_between_lies_between(
    tuned: nn.Module,
    base: str,
) -> None:
    weights = read_weights(base)
    zero, quarter, half, one = (merged_weights(tuned, scale) for scale in (0.0, 0.25, 0.5, 1.0))
    assert set(zero) == set(weights)
    assert all(torch.equal(zero[name], weights[name]) for name in weights)
    for name in (
        'decoder.layers.0.self_attn.attn.in_proj_weight',
        'decoder.layers.0.self_attn.attn.out_proj.weight',
        'encoder.layers.0.ffn.layers.1.weight',
        'bbox_head.reg_branches.0.0.weight',
        'neck.convs.0.gn.bias',
    ):
        assert not torch.equal(zero[name], one[name])
        torch.testing.assert_close(half[name], (zero[name] + one[name]) / 2)
        torch.testing.assert_close(quarter[name], (3 * zero[name] + one[name]) / 4)


def test_merging_does_not_depend_on_the_variant(
    text_dir: str,
    base: str,
    stock: nn.Module,
) -> None:
    lora = dict(preset='decoder', init_lora_weights='pissa', exclude_modules=['attn'], r=2)
    detector = build(text_dir, lora=lora, base_checkpoint=base)
    train(detector, steps=1)
    stock.load_state_dict(merged_weights(detector))
    assert_same_detections(detector, stock)
    weights = read_weights(base)
    assert all(torch.equal(w, weights[name]) for name, w in merged_weights(detector, 0.0).items())


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / 'file'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt), atomic(str(path)) as partial:
        Path(partial).write_text('half of the n')
        raise KeyboardInterrupt
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['file']
    with atomic(str(path)) as partial:
        Path(partial).write_text('new')
    assert path.read_text() == 'new' and os.listdir(tmp_path) == ['file']


class _Toy(nn.Module):
    """A parameter that learns, an adapter pair, and an adapter pair beside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.free = nn.Parameter(torch.ones(2))
        self.used = self._pair()
        self.unused = self._pair()

    def _pair(self) -> nn.Module:
        pair = nn.Module()
        pair.lora_A, pair.lora_B = nn.ModuleDict(), nn.ModuleDict()
        pair.lora_A['default'], pair.lora_B['default'] = (
            nn.Linear(2, 1, bias=False),
            nn.Linear(1, 2, bias=False),
        )
        nn.init.zeros_(pair.lora_B['default'].weight)
        return pair

    def step(self, lr: float, unused: bool = False) -> None:
        x = self.free
        for pair in [self.used, *([self.unused] if unused else [])]:
            x = x + pair.lora_B['default'](pair.lora_A['default'](x))
        x.sum().backward()
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
                    parameter.grad = None


def test_a_parameter_without_gradient_stops_the_run_by_name() -> None:
    toy = _Toy()
    check = GradientCheck(toy, iterations=3)
    for _ in range(2):
        toy.step(lr=0.1)
        check.after_step(num_boxes=4)
    toy.step(lr=0.1)
    with pytest.raises(ConfigError, match='unused.lora_B.default.weight.*check_adapters=False'):
        check.after_step(num_boxes=4)


def test_adapters_that_wait_for_the_first_update_are_not_blamed() -> None:
    toy = _Toy()
    check = GradientCheck(toy, iterations=2)
    for lr in (0.0, 0.0, 0.0, 0.1, 0.1, 0.1):  # gradients accumulate, or the warm-up starts at 0
        toy.step(lr, unused=True)
        check.after_step(num_boxes=1)
    assert check.done


def test_steps_without_boxes_prove_nothing() -> None:
    toy = _Toy()
    check = GradientCheck(toy, iterations=1)
    for _ in range(5):
        check.after_step(num_boxes=0)
    assert not check.done


def test_the_label_embedding_of_denoising_stays_out_of_the_folder(
    text_dir: str, base: str, tmp_path: Path
) -> None:
    cfg = detector_cfg(text_dir, base_checkpoint=base)
    cfg.bbox_head.num_classes = 5  # the base's rows are of another number: they are trained anew
    detector = build_cfg(cfg)
    assert detector.dn_query_generator.label_embedding.weight.requires_grad
    detector.export_adapter(str(tmp_path))
    config = json.loads((tmp_path / 'adapter_config.json').read_text(encoding='utf-8'))
    names = [*load_file(tmp_path / 'adapter_model.safetensors'), *config['modules_to_save']]
    assert len(names) > 10 and not [name for name in names if 'dn_query_generator' in name]

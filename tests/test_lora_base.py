"""Base checkpoints: found, read safely, checked against the architecture, remembered."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import inject, load_base, lora_state
from mmdet_gdino_lora.lora.store.base import fingerprint
from mmdet_gdino_lora.lora.tensors import plain_tensors
from tests.builders import build_stock, stock_cfg

LABEL = 'dn_query_generator.label_embedding.weight'


@pytest.fixture(scope='module')
def trained(text_dir: str) -> nn.Module:
    return build_stock(text_dir)


@pytest.fixture
def detector(text_dir: str) -> nn.Module:
    torch.manual_seed(2)  # other weights than the trained
    return build_stock(text_dir)


def _weights(detector: nn.Module) -> dict:
    return {name: value.clone() for name, value in detector.state_dict().items()}


@pytest.mark.parametrize('form', ['mmdet', 'bare', 'parallel', 'safetensors'])
def test_a_base_is_read_from_the_forms_that_it_comes_in(
    trained: nn.Module, detector: nn.Module, tmp_path: Path, form: str
) -> None:
    weights = _weights(trained)
    path = tmp_path / ('base.safetensors' if form == 'safetensors' else 'base.pth')
    if form == 'safetensors':
        save_file(weights, path)
    elif form == 'mmdet':
        log = HistoryBuffer([1.0, 2.0], [1, 1])
        torch.save(dict(meta=dict(epoch=3), state_dict=weights, message_hub=dict(log=log)), path)
    else:
        prefix = 'module.' if form == 'parallel' else ''
        torch.save({prefix + name: value for name, value in weights.items()}, path)
    base = load_base(detector, str(path))
    assert base.source == str(path) and not base.absent
    assert lora_state(detector).base is base
    for name, value in detector.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_a_base_with_other_classes_leaves_its_label_embedding_to_be_trained(
    trained: nn.Module, detector: nn.Module, tmp_path: Path
) -> None:
    weights = {**_weights(trained), LABEL: torch.randn(80, 256)}
    torch.save(weights, tmp_path / 'base.pth')
    own = detector.dn_query_generator.label_embedding.weight.detach().clone()
    assert load_base(detector, str(tmp_path / 'base.pth')).absent == {LABEL}
    assert torch.equal(detector.dn_query_generator.label_embedding.weight, own)
    report = inject(detector, {}, train_box_head=False)
    assert LABEL in report.trained


def test_a_base_with_the_same_classes_keeps_its_label_embedding_frozen(
    trained: nn.Module, detector: nn.Module, tmp_path: Path
) -> None:
    torch.save(_weights(trained), tmp_path / 'base.pth')
    load_base(detector, str(tmp_path / 'base.pth'))
    assert LABEL not in inject(detector, {}).trained


def test_the_fingerprint_tells_which_part_differs_and_survives_injection(
    trained: nn.Module,
) -> None:
    before = fingerprint(plain_tensors(trained))
    injected = copy.deepcopy(trained)
    inject(injected, dict(preset='all'))
    assert fingerprint(plain_tensors(injected)) == before
    with torch.no_grad():
        next(injected.encoder.parameters()).view(-1)[0] += 1e-3
    after = fingerprint(plain_tensors(injected))
    assert {group for group in before if before[group] != after[group]} == {'encoder'}


class _Payload:
    def __reduce__(self) -> tuple:
        return os.system, ('touch owned',)


def _refusal(detector: nn.Module, source: Path | str) -> str:
    before = _weights(detector)
    with pytest.raises(ConfigError) as error:
        load_base(detector, str(source))
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    message = str(error.value)
    assert '\n' not in message and str(source) in message
    return message


def test_a_missing_file_is_named(detector: nn.Module, tmp_path: Path) -> None:
    assert 'no such file' in _refusal(detector, tmp_path / 'nowhere.pth')


def test_an_url_that_cannot_be_reached_says_where_to_put_the_file(
    detector: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    message = _refusal(detector, 'http://127.0.0.1:9/grounding_dino.pth')
    assert 'cannot be downloaded' in message and str(tmp_path) in message


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('kept', [0, 100, 200_000])
def test_a_truncated_file_is_refused(
    trained: nn.Module, detector: nn.Module, tmp_path: Path, suffix: str, kept: int
) -> None:
    path = tmp_path / f'base{suffix}'
    if suffix == '.pth':
        torch.save(_weights(trained), path)
    else:
        save_file(_weights(trained), path)
    path.write_bytes(path.read_bytes()[:kept])
    _refusal(detector, path)


def test_a_file_that_would_run_code_is_not_unpickled(
    detector: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict=dict(weight=_Payload())), tmp_path / 'base.pth')
    assert 'could run code' in _refusal(detector, tmp_path / 'base.pth')
    assert not (tmp_path / 'owned').exists()


def test_another_architecture_is_refused_with_the_names_that_differ(
    trained: nn.Module, text_dir: str, tmp_path: Path
) -> None:
    path = tmp_path / 'base.pth'
    torch.save(_weights(trained), path)
    cfg = stock_cfg(text_dir)
    backbone = {**cfg['backbone'], 'embed_dims': 24, 'num_heads': [1, 2, 4, 8]}
    neck = {**cfg['neck'], 'in_channels': [48, 96, 192]}
    message = _refusal(build_stock(text_dir, backbone=backbone, neck=neck), path)
    assert 'another shape' in message and 'backbone.patch_embed.projection.weight' in message
    deeper = {**cfg['encoder'], 'num_layers': 3}
    message = _refusal(build_stock(text_dir, encoder=deeper), path)
    assert 'are not in the file (encoder.layers.2' in message
    shallower = {**cfg['encoder'], 'num_layers': 1}
    message = _refusal(build_stock(text_dir, encoder=shallower), path)
    assert 'are not in the model (encoder.layers.1' in message

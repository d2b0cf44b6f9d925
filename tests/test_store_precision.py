"""A base in half the bytes: what goes out of the detector has lost nothing by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner.checkpoint import load_checkpoint
from safetensors.torch import load_file
from torch import nn

from mmdet_gdino_lora.lora import export_adapter
from mmdet_gdino_lora.lora.store.base import read_weights
from mmdet_gdino_lora.lora.store.merge import merged_weights
from tests.builders import build
from tests.detectors import save

ATTENTION = 'decoder.layers.0.self_attn.attn.out_proj.weight'
LINEAR = 'encoder.layers.0.ffn.layers.1.weight'
CONVOLUTION = 'neck.convs.0.conv.weight'


def stir(detector: nn.Module) -> nn.Module:
    """Gives trained weights the size that they have after a short fine-tuning."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=2e-3)
    return detector


@pytest.mark.parametrize(
    ('variant', 'adapted'),
    [
        (dict(), [ATTENTION, LINEAR, CONVOLUTION]),
        (dict(use_dora=True, exclude_modules=['attn']), [LINEAR, CONVOLUTION]),
    ],
    ids=['lora', 'dora'],
)
def test_merging_into_a_half_precision_base_is_merging_into_the_base(
    text_dir: str,
    base: str,
    tmp_path: Path,
    variant: dict[str, Any],
    adapted: list[str],
) -> None:
    lora = dict(preset='all', r=2, **variant)
    exact = stir(build(text_dir, lora=lora, base_checkpoint=base))
    path = save(exact, tmp_path / 'tuned.pth')
    half = build(text_dir, lora=lora, base_checkpoint=base, base_dtype='bfloat16')
    load_checkpoint(half, path)
    weights = read_weights(base)
    for scale in (0.0, 0.5, 1.0):
        wanted, found = merged_weights(exact, scale), merged_weights(half, scale)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)
        moved = [name for name in adapted if not torch.equal(found[name], weights[name])]
        assert moved == ([] if scale == 0 else adapted)


def test_what_the_initialisation_rewrote_is_not_taken_from_the_base(
    text_dir: str, base: str, tmp_path: Path
) -> None:
    lora = dict(preset='decoder', r=2, init_lora_weights='pissa', exclude_modules=['attn'])
    exact = stir(build(text_dir, lora=lora, base_checkpoint=base))
    half = build(text_dir, lora=lora, base_checkpoint=base, base_dtype='bfloat16')
    load_checkpoint(half, save(exact, tmp_path / 'tuned.pth'))
    name = 'decoder.layers.0.ffn.layers.1.weight'
    wanted = merged_weights(exact)[name]
    torch.testing.assert_close(merged_weights(half)[name], wanted, rtol=2**-8, atol=1e-3)


def test_a_module_that_is_exported_whole_has_the_base_in_full_precision(
    text_dir: str,
    base: str,
    tmp_path: Path,
) -> None:
    detector = stir(
        build(
            text_dir,
            base_checkpoint=base,
            base_dtype='bfloat16',
            trainable=[r'^text_feat_map\.bias'],
        )
    )
    assert detector.text_feat_map.weight.dtype == torch.bfloat16
    export_adapter(detector, str(tmp_path))
    exported = load_file(tmp_path / 'adapter_model.safetensors')
    exported = {name.removeprefix('base_model.model.'): w for name, w in exported.items()}
    assert torch.equal(exported['text_feat_map.weight'], read_weights(base)['text_feat_map.weight'])
    assert torch.equal(exported['text_feat_map.bias'], detector.text_feat_map.bias)

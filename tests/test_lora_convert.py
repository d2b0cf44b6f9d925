"""Bases of other releases come in, tuned models go back, with the same outputs on both sides."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

import mmdet_gdino_lora  # noqa: F401
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.store.convert import OFFICIAL, from_mmdet, release_of, to_mmdet
from mmdet_gdino_lora.lora.store.merge import merged_weights
from mmdet_gdino_lora.lora.store.official_format import write_official
from mmdet_gdino_lora.lora.store.transformers_format import write_transformers
from mmdet_gdino_lora.lora.tensors import plain_tensors
from tests.builders import WITH_MM, WORDS, build_cfg, data_samples, detector_cfg

NAMES = ['red star', 'dog', 'hot dog']
PLAIN = dict(max_text_len=256)
SCALED = dict(max_text_len=256, log_scale='auto', bias=True)


def convertible(text_dir: str, contrastive: dict, **overrides: Any) -> nn.Module:
    """A detector whose encoder has the proportions that transformers takes for granted."""
    cfg = detector_cfg(text_dir)
    cfg['bbox_head']['contrastive_cfg'] = contrastive
    cfg['encoder']['text_layer_cfg']['ffn_cfg']['feedforward_channels'] = 32
    cfg['encoder']['fusion_layer_cfg']['embed_dim'] = 32
    for key, value in overrides.items():
        cfg[key] = value
    detector = build_cfg(cfg)
    detector.init_weights()
    return detector.eval()


def stir(model: nn.Module) -> nn.Module:
    """Moves every weight off its initial value, so that none can be missed unseen."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.03)
    return model.eval()


@torch.no_grad()
def outputs(detector: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [B, Q, T] and boxes [B, Q, 4] of the last decoder layer."""
    found = []
    handle = detector.bbox_head.register_forward_hook(lambda _, __, out: found.append(out))
    detector.predict(images, data_samples(NAMES, [1] * len(images)))
    handle.remove()
    logits, boxes = found[0][:2]
    return logits[-1], boxes[-1]


@torch.no_grad()
def transformers_outputs(
    model: nn.Module, detector: nn.Module, images: Tensor
) -> tuple[Tensor, Tensor]:
    caption = detector.language_model.caption_tokenizer.from_names(NAMES)
    ids = torch.from_numpy(caption.input_ids).long()[None].expand(len(images), -1)
    result = model(pixel_values=images, input_ids=ids, attention_mask=torch.ones_like(ids))
    return result.logits, result.pred_boxes


def assert_same_outputs(model: nn.Module, detector: nn.Module) -> None:
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    logits, boxes = outputs(detector, images)
    theirs, their_boxes = transformers_outputs(model, detector, images)
    width = logits.shape[-1]
    torch.testing.assert_close(logits, theirs[..., :width], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(boxes, their_boxes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('share', [True, False])
def test_transformers_own_model_serves_as_base_with_equal_outputs(
    text_dir: str, special_tokens: None, tmp_path: Path, share: bool
) -> None:
    like = convertible(text_dir, PLAIN, lora=None)
    text_config = like.language_model.language_backbone.body.model.config.to_dict()
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(
            embed_dim=12,
            depths=[1, 1, 2, 1],
            num_heads=[1, 2, 3, 4],
            window_size=7,
            out_features=['stage2', 'stage3', 'stage4'],
        ),
        text_config=text_config,
        num_queries=30,
        encoder_layers=2,
        decoder_layers=3,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        decoder_bbox_embed_share=share,
    )
    model = stir(GroundingDinoForObjectDetection(config))
    model.save_pretrained(tmp_path)
    detector = convertible(text_dir, PLAIN, base_checkpoint=str(tmp_path))
    assert_same_outputs(model, detector)
    with pytest.raises(ConfigError, match=r'contrastive_cfg=.*256'):
        convertible(text_dir, SCALED, base_checkpoint=str(tmp_path))


def test_a_transformers_without_the_architecture_is_told(
    text_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, 'transformers.models.mm_grounding_dino', None)
    name = 'transformers.models.mm_grounding_dino.modeling_mm_grounding_dino'
    monkeypatch.delitem(sys.modules, name, raising=False)
    detector = convertible(text_dir, SCALED)
    with pytest.raises(ConfigError, match='has no MMGroundingDino.*install transformers>=4.55'):
        write_transformers(str(tmp_path / 'out'), detector, merged_weights(detector))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    'contrastive', [PLAIN, pytest.param(SCALED, marks=WITH_MM)], ids=['plain', 'scaled']
)
def test_a_merged_detector_goes_to_transformers_and_comes_back(
    text_dir: str, special_tokens: None, tmp_path: Path, contrastive: dict
) -> None:
    detector = stir(convertible(text_dir, contrastive, lora=dict(preset='decoder', r=2)))
    weights = merged_weights(detector)
    name = write_transformers(str(tmp_path), detector, weights)
    assert name.startswith('MM') == (contrastive is SCALED)
    assert_same_outputs(getattr(transformers, name).from_pretrained(tmp_path).eval(), detector)
    again = convertible(text_dir, contrastive, base_checkpoint=str(tmp_path))
    own = plain_tensors(again)
    assert all(torch.equal(own[n], w) for n, w in weights.items() if 'dn_query' not in n)


def test_what_transformers_cannot_express_is_refused(
    text_dir: str, special_tokens: None, tmp_path: Path
) -> None:
    fixed = dict(max_text_len=256, log_scale=0.5)
    detector = convertible(text_dir, fixed, lora=None)
    with pytest.raises(ConfigError, match='log_scale'):
        write_transformers(str(tmp_path), detector, {})
    wide = detector_cfg(text_dir)['encoder']
    detector = convertible(text_dir, PLAIN, lora=None, encoder=wide)
    with pytest.raises(ConfigError, match='text layer ffn is 64'):
        write_transformers(str(tmp_path), detector, {})
    assert not list(tmp_path.iterdir())


def test_the_official_names_are_those_that_mmdets_converter_reads(
    text_dir: str, tmp_path: Path
) -> None:
    detector = stir(convertible(text_dir, PLAIN, lora=None))
    own = plain_tensors(detector)
    official = from_mmdet(own, OFFICIAL)
    assert release_of(official) == OFFICIAL
    back = to_mmdet(official, OFFICIAL, own)
    assert all(torch.equal(back[name], own[name]) for name in back)

    path = Path(mmdet.__file__).parent / '.mim/tools/model_converters/groundingdino_to_mmdet.py'
    if path.exists():
        spec = importlib.util.spec_from_file_location('converter', path)
        converter = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(converter)
        theirs = converter.convert({f'module.{name}': w for name, w in official.items()})
        # that script takes six decoder layers for granted
        theirs = {n.replace('reg_branches.6.', 'reg_branches.3.'): w for n, w in theirs.items()}
        assert set(theirs) == set(back)
        assert all(torch.equal(theirs[name], back[name]) for name in back)

    torch.save(dict(model={f'module.{n}': w for n, w in official.items()}), tmp_path / 'base.pth')
    tuned = convertible(text_dir, PLAIN, base_checkpoint=str(tmp_path / 'base.pth'))
    assert tuned.lora_state.base.absent == {'dn_query_generator.label_embedding.weight'}
    assert len(WORDS) == tuned.dn_query_generator.label_embedding.weight.shape[0]
    loaded = plain_tensors(tuned)
    assert all(torch.equal(loaded[name], own[name]) for name in back)


def swin_tiny(text_dir: str, **overrides: Any) -> nn.Module:
    """A detector with Swin-T as the official release builds it, and few layers behind it."""
    backbone = detector_cfg(text_dir)['backbone']
    backbone.update(embed_dims=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24])
    neck = detector_cfg(text_dir)['neck']
    neck['in_channels'] = [192, 384, 768]
    return convertible(text_dir, PLAIN, backbone=backbone, neck=neck, **overrides)


def test_a_merged_swin_goes_to_the_official_release_and_comes_back(
    text_dir: str, tmp_path: Path
) -> None:
    detector = stir(swin_tiny(text_dir, lora=dict(preset='all', r=2)))
    weights = merged_weights(detector)
    path = tmp_path / 'tuned.pth'
    assert write_official(str(path), detector, weights) == 'swin_T_224_1k'
    (model,) = torch.load(path, weights_only=True).values()
    assert all(name.startswith('module.') for name in model)
    # its code finds the branches under either name
    for name in model:
        if '.decoder.bbox_embed.' in name:
            assert torch.equal(model[name], model[name.replace('transformer.decoder.', '')])
    config: dict[str, Any] = {}
    exec((tmp_path / 'tuned.py').read_text(), config)
    assert config['num_queries'] == 30 and config['text_encoder_type'] == text_dir
    assert config['dec_layers'] == 3 and config['return_interm_indices'] == [1, 2, 3]
    assert not config['dec_pred_bbox_embed_share']  # the branches differ
    again = plain_tensors(swin_tiny(text_dir, base_checkpoint=str(path)))
    assert all(torch.equal(again[n], w) for n, w in weights.items() if 'dn_query' not in n)


OFFICIAL_PYTHON = os.environ.get('OFFICIAL_PYTHON', '')


@pytest.mark.skipif(
    not OFFICIAL_PYTHON,
    reason="the official release's code needs an environment of its own: see docs/export.md",
)
def test_the_official_code_computes_the_same_from_what_was_written(
    text_dir: str, tmp_path: Path
) -> None:
    text = tmp_path / 'text'  # that code loads text weights before it loads ours
    shutil.copytree(text_dir, text)
    detector = stir(swin_tiny(str(text), lora=dict(preset='all', r=2)))
    detector.language_model.language_backbone.body.model.save_pretrained(text)
    written, given, result = (str(tmp_path / name) for name in ('tuned.pth', 'in.pt', 'out.pt'))
    write_official(written, detector, merged_weights(detector))
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(3))
    caption = detector.language_model.caption_tokenizer.from_names(NAMES)
    torch.save(dict(images=images, captions=[caption.text] * 2), given)
    code = str(Path(__file__).with_name('official_code.py'))
    command = [OFFICIAL_PYTHON, '-W', 'ignore', code, str(tmp_path / 'tuned.py')]
    done = subprocess.run([*command, written, given, result], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(result)
    logits, boxes = outputs(detector, images)
    width = logits.shape[-1]
    finite = logits.isfinite()
    assert boxes.std() > 0.05 and logits[finite].std() > 0.05
    torch.testing.assert_close(theirs['pred_logits'][..., :width], logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(theirs['pred_boxes'], boxes, rtol=1e-4, atol=1e-5)
    # Nobody reads the pooler, and the indices are computed.
    nobodys = ('bert.pooler.', 'bert.embeddings.position_ids')
    missing = [name for name in theirs['missing'] if not name.startswith(nobodys)]
    assert [name for name in missing if not name.endswith('.relative_position_index')] == []
    assert theirs['unexpected'] == []


def test_what_the_official_release_cannot_express_is_refused(text_dir: str, tmp_path: Path) -> None:
    path = str(tmp_path / 'tuned.pth')
    wide = detector_cfg(text_dir)['encoder']
    other = detector_cfg(text_dir)['decoder']
    other['layer_cfg']['ffn_cfg']['feedforward_channels'] = 128
    offset = dict(num_feats=128, normalize=True, offset=-0.5, temperature=20)
    for match, detector in (
        ('Swin-T.*width 12', convertible(text_dir, PLAIN, lora=None)),
        ('text layer ffn is 64', swin_tiny(text_dir, lora=None, encoder=wide)),
        ('feed-forward width is 64 .* 128', swin_tiny(text_dir, lora=None, decoder=other)),
        ('offset=-0.5', swin_tiny(text_dir, lora=None, positional_encoding=offset)),
    ):
        with pytest.raises(ConfigError, match=f'--format official: .*{match}.*--format mmdet'):
            write_official(path, detector, {})
    for head, match in ((SCALED, "log_scale='auto' and bias=True"), (dict(max_text_len=9), '=9')):
        detector = swin_tiny(text_dir, lora=None)
        detector.bbox_head = convertible(text_dir, head, lora=None).bbox_head
        with pytest.raises(ConfigError, match=match):
            write_official(path, detector, {})
    assert not list(tmp_path.iterdir())

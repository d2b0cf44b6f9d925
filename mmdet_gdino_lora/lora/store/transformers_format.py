"""A merged detector as a folder that transformers loads."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from mmdet.models.detectors import GroundingDINO
from safetensors.torch import save_file
from torch import Tensor
from transformers import GroundingDinoConfig, GroundingDinoImageProcessor, SwinConfig

from mmdet_gdino_lora.engine.atomic import atomic
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.store.convert import TRANSFORMERS, from_mmdet
from mmdet_gdino_lora.lora.store.proportions import check_proportions


def write_transformers(folder: str, detector: GroundingDINO, weights: Mapping[str, Tensor]) -> str:
    """Writes ``config.json``, ``model.safetensors``, the tokenizer and the image processor.

    Scores that are scaled and biased (MM Grounding DINO) become transformers'
    ``MMGroundingDinoForObjectDetection``, plain ones ``GroundingDinoForObjectDetection``.

    Args:
        folder: Created if missing.
        detector: Says how the weights are used.
        weights: Under mmdet's names, as merged.

    Returns:
        Name of transformers' class.

    Raises:
        ConfigError: If transformers' classes can't express this detector.
    """
    modeling, family = _modeling(detector)
    config = _config(detector, family)
    _check_special_tokens(detector, modeling)
    name = f'{family}ForObjectDetection'
    config.architectures = [name]
    converted = from_mmdet(weights, TRANSFORMERS)
    if family == 'MMGroundingDino' and 'class_embed.0.bias' not in converted:
        for i in range(config.decoder_layers):
            converted[f'class_embed.{i}.bias'] = torch.zeros(())
        converted['model.encoder_output_class_embed.bias'] = torch.zeros(())
    with torch.device('meta'):
        names = getattr(modeling, name)(config).state_dict()
    # In transformers 5 it is there, but not part of forward.
    unread = 'model.backbone.conv_encoder.model.swin.layernorm.'
    if unread + 'weight' in names:
        width = config.backbone_config.embed_dim * 2 ** (len(config.backbone_config.depths) - 1)
        converted[unread + 'weight'] = torch.ones(width)
        converted[unread + 'bias'] = torch.zeros(width)
    os.makedirs(folder, exist_ok=True)
    config.save_pretrained(folder)
    detector.language_model.tokenizer.save_pretrained(folder)
    preprocessor = detector.data_preprocessor
    GroundingDinoImageProcessor(
        image_mean=[value / 255 for value in preprocessor.mean.flatten().tolist()],
        image_std=[value / 255 for value in preprocessor.std.flatten().tolist()],
    ).save_pretrained(folder)
    with atomic(os.path.join(folder, 'model.safetensors')) as partial:
        save_file(
            {n: t.contiguous() for n, t in converted.items()}, partial, metadata={'format': 'pt'}
        )
    model, report = getattr(modeling, name).from_pretrained(folder, output_loading_info=True)
    # Older releases list what they compute when they build the model, such as window positions.
    buffers = {buffer for buffer, _ in model.named_buffers()}
    report['missing_keys'] = set(report['missing_keys']) - buffers
    for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        if report[kind]:
            raise ConfigError(
                f"{folder}: transformers' {name} does not take these weights "
                f'({kind.replace("_", " ")}: {sorted(map(str, report[kind]))[:3]}); install a '
                'tested version of transformers.'
            )
    return name


def _modeling(detector: GroundingDINO) -> tuple[Any, str]:
    branch = detector.bbox_head.cls_branches[0]
    if branch.log_scale in (None, 'none') and branch.bias is None:
        return _module('grounding_dino'), 'GroundingDino'
    if branch.log_scale == 'auto':
        try:
            return _module('mm_grounding_dino'), 'MMGroundingDino'
        except ImportError as error:
            raise ConfigError(
                'this transformers has no MMGroundingDinoForObjectDetection, which scaled scores '
                '(contrastive_cfg.log_scale) need; install transformers>=4.55.'
            ) from error
    raise ConfigError(
        f'transformers has no class for contrastive_cfg.log_scale={branch.log_scale!r}'
        f'{" with a bias" if branch.bias is not None else ""}; write --format mmdet.'
    )


def _module(name: str) -> Any:
    return importlib.import_module(f'transformers.models.{name}.modeling_{name}')


def _config(detector: GroundingDINO, family: str) -> GroundingDinoConfig:
    backbone, encoder, decoder = detector.backbone, detector.encoder, detector.decoder
    if type(backbone).__name__ != 'SwinTransformer':
        raise ConfigError(
            f'--format transformers: the {type(backbone).__name__} backbone has no converter to '
            'transformers (Swin has); write --format mmdet.'
        )
    check_proportions(detector, TRANSFORMERS)
    attention = [stage.blocks[0].attn.w_msa for stage in backbone.stages]
    swin = SwinConfig(
        embed_dim=backbone.patch_embed.projection.out_channels,
        patch_size=backbone.patch_embed.projection.kernel_size[0],
        depths=[len(stage.blocks) for stage in backbone.stages],
        num_heads=[a.num_heads for a in attention],
        window_size=attention[0].window_size[0],
        mlp_ratio=backbone.stages[0].blocks[0].ffn.feedforward_channels / attention[0].embed_dims,
        out_features=[f'stage{i + 1}' for i in backbone.out_indices],
    )
    layer = encoder.layers[0]
    values = dict(
        num_queries=detector.num_queries,
        encoder_layers=encoder.num_layers,
        decoder_layers=decoder.num_layers,
        encoder_ffn_dim=layer.ffn.feedforward_channels,
        decoder_ffn_dim=decoder.layers[0].ffn.feedforward_channels,
        encoder_attention_heads=layer.self_attn.num_heads,
        decoder_attention_heads=decoder.layers[0].self_attn.num_heads,
        encoder_n_points=layer.self_attn.num_points,
        decoder_n_points=decoder.layers[0].cross_attn.num_points,
        num_feature_levels=detector.num_feature_levels,
        d_model=detector.embed_dims,
        max_text_len=detector.bbox_head.cls_branches[0].max_text_len,
        positional_embedding_temperature=detector.positional_encoding.temperature,
    )
    config_class = getattr(importlib.import_module('transformers'), f'{family}Config')
    body = detector.language_model.language_backbone.body.model
    return config_class(
        backbone_config=swin,
        text_config=body.config.to_dict(),
        decoder_bbox_embed_share=False,
        **({'decoder_cls_embed_share': False} if family == 'MMGroundingDino' else {}),
        **values,
    )


def _check_special_tokens(detector: GroundingDINO, modeling: Any) -> None:
    tokenizer = detector.language_model.tokenizer
    ours = tokenizer.convert_tokens_to_ids(['[CLS]', '[SEP]', '.', '?'])
    if sorted(ours) != sorted(modeling.SPECIAL_TOKENS):
        raise ConfigError(
            f'--format transformers: its code separates names at the tokens '
            f'{modeling.SPECIAL_TOKENS} of bert-base-uncased, and this text model has {ours}; '
            'write --format mmdet.'
        )

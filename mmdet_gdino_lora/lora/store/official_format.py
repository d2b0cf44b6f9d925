"""A merged detector as the official release's code (IDEA-Research) loads it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from mmdet.models.detectors import GroundingDINO
from torch import Tensor

from mmdet_gdino_lora.engine.atomic import atomic
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.store.convert import OFFICIAL, from_mmdet
from mmdet_gdino_lora.lora.store.proportions import check_proportions

SWINS: dict[tuple, str] = {
    (96, (2, 2, 6, 2), (3, 6, 12, 24), 7): 'swin_T_224_1k',
    (128, (2, 2, 18, 2), (4, 8, 16, 32), 7): 'swin_B_224_22k',
    (128, (2, 2, 18, 2), (4, 8, 16, 32), 12): 'swin_B_384_22k',
    (192, (2, 2, 18, 2), (6, 12, 24, 48), 7): 'swin_L_224_22k',
    (192, (2, 2, 18, 2), (6, 12, 24, 48), 12): 'swin_L_384_22k',
}
"""Width, depths, heads and window of the backbones that the release's code can build."""

MAX_TEXT_LEN = 256
"""It's a constant there."""

_DECODER = 'transformer.decoder.'


# What the release's code asks for and no detector here changes.
_FIXED = dict(
    position_embedding='sine',
    backbone_freeze_keywords=None,
    pre_norm=False,
    dropout=0.0,
    query_dim=4,
    num_patterns=0,
    two_stage_type='standard',
    two_stage_bbox_embed_share=False,
    two_stage_class_embed_share=False,
    transformer_activation='relu',
    dec_pred_bbox_embed_share=False,
    dn_box_noise_scale=1.0,
    dn_label_noise_ratio=0.5,
    dn_label_coef=1.0,
    dn_bbox_coef=1.0,
    embed_init_tgt=True,
    dn_labelbook_size=2000,
    max_text_len=MAX_TEXT_LEN,
    use_text_enhancer=True,
    use_fusion_layer=True,
    use_checkpoint=False,
    use_transformer_ckpt=False,
    use_text_cross_attention=True,
    text_dropout=0.0,
    fusion_dropout=0.0,
    fusion_droppath=0.0,
    sub_sentence_present=True,
    batch_size=1,
    modelname='groundingdino',
)


def config_path(path: str) -> str:
    """Names the config that is written beside a checkpoint.

    Args:
        path: Of the checkpoint.

    Returns:
        Its path with ``.py``.
    """
    return os.path.splitext(path)[0] + '.py'


def write_official(path: str, detector: GroundingDINO, weights: Mapping[str, Tensor]) -> str:
    """Writes a checkpoint, and the config that the release's ``load_model`` wants with it.

    The release's own configs share one box branch among the decoder's layers
    (``dec_pred_bbox_embed_share``), which training has made different: of a checkpoint loaded by
    them the last layer's would silently serve all.

    Args:
        path: Of the checkpoint.
        detector: Says how the weights are used.
        weights: Under mmdet's names, as merged.

    Returns:
        The backbone's name in the release.

    Raises:
        ConfigError: If the release's code can't build this detector.
    """
    config = official_config(detector)
    converted = from_mmdet(weights, OFFICIAL)
    for name in list(converted):
        # Its model holds the branches under two names.
        if name.startswith(f'{_DECODER}bbox_embed.'):
            converted[name.removeprefix(_DECODER)] = converted[name]
    model = {f'module.{name}': tensor for name, tensor in converted.items()}
    with atomic(path) as partial:
        torch.save(dict(model=model), partial)
    with atomic(config_path(path)) as partial, open(partial, 'w', encoding='utf-8') as file:
        file.writelines(f'{key} = {value!r}\n' for key, value in config.items())
    return config['backbone']


def official_config(detector: GroundingDINO) -> dict[str, Any]:
    """Describes a detector in the release's words.

    Args:
        detector: Says how the weights are used.

    Returns:
        Settings by name.

    Raises:
        ConfigError: If the release's code can't build this detector.
    """
    name = _backbone_name(detector)
    _check_head(detector)
    check_proportions(detector, OFFICIAL)
    _check_shared_numbers(detector)
    encoder, decoder = detector.encoder.layers[0], detector.decoder.layers[0]
    positions = detector.positional_encoding
    return dict(
        backbone=name,
        pe_temperatureH=positions.temperature,
        pe_temperatureW=positions.temperature,
        return_interm_indices=list(detector.backbone.out_indices),
        enc_layers=detector.encoder.num_layers,
        dec_layers=detector.decoder.num_layers,
        dim_feedforward=encoder.ffn.feedforward_channels,
        hidden_dim=detector.embed_dims,
        nheads=encoder.self_attn.num_heads,
        num_queries=detector.num_queries,
        num_feature_levels=detector.num_feature_levels,
        enc_n_points=encoder.self_attn.num_points,
        dec_n_points=decoder.cross_attn.num_points,
        text_encoder_type=detector.language_model.name,
        **_FIXED,
    )


def _check_shared_numbers(detector: GroundingDINO) -> None:
    encoder, decoder = detector.encoder.layers[0], detector.decoder.layers[0]
    for what, theirs, ours in (
        ('feed-forward width', encoder.ffn, decoder.ffn),
        ('number of heads', encoder.self_attn, decoder.self_attn),
        ('number of heads', encoder.self_attn, decoder.cross_attn),
    ):
        key = 'num_heads' if 'heads' in what else 'feedforward_channels'
        if getattr(theirs, key) != getattr(ours, key):
            raise ConfigError(
                f'--format official: the {what} is {getattr(theirs, key)} in the encoder and '
                f'{getattr(ours, key)} in the decoder, and the code there knows one number; write '
                '--format mmdet.'
            )
    positions = detector.positional_encoding
    if not positions.normalize or positions.offset != 0:
        raise ConfigError(
            f'--format official: model.positional_encoding has normalize={positions.normalize} and '
            f'offset={positions.offset}, and the code there computes True and 0; write '
            '--format mmdet.'
        )


def _backbone_name(detector: GroundingDINO) -> str:
    backbone = detector.backbone
    found = type(backbone).__name__
    if found == 'SwinTransformer':
        attention = [stage.blocks[0].attn.w_msa for stage in backbone.stages]
        sizes = (
            backbone.patch_embed.embed_dims,
            tuple(len(stage.blocks) for stage in backbone.stages),
            tuple(layer.num_heads for layer in attention),
            attention[0].window_size[0],
        )
        if sizes in SWINS and list(backbone.out_indices) in ([0, 1, 2, 3], [1, 2, 3], [3]):
            return SWINS[sizes]
        found += f' of width {sizes[0]}, depths {sizes[1]} and window {sizes[3]}'
    raise ConfigError(
        f'--format official: the code there builds Swin-T, Swin-B and Swin-L, and model.backbone '
        f'is a {found}; write --format mmdet.'
    )


def _check_head(detector: GroundingDINO) -> None:
    branch = detector.bbox_head.cls_branches[0]
    scale = None if branch.log_scale in (None, 'none') else branch.log_scale
    scale = 'trained' if isinstance(scale, Tensor) else scale
    if scale is not None or branch.bias is not None:
        raise ConfigError(
            '--format official: scores there are plain products, and model.bbox_head.'
            f'contrastive_cfg says log_scale={scale!r} and bias={branch.bias is not None} (MM '
            'Grounding DINO); write --format transformers or mmdet.'
        )
    if branch.max_text_len != MAX_TEXT_LEN:
        raise ConfigError(
            f'--format official: captions there have {MAX_TEXT_LEN} tokens, and model.bbox_head.'
            f'contrastive_cfg says max_text_len={branch.max_text_len}; write --format mmdet.'
        )

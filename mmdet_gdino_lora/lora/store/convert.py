"""Names and layouts of other releases' weights: the official one's and transformers'.

Both tables are read from mmdet's side: every weight of the detector at hand says where it comes
from. Attention projections that mmdet packs are three weights in transformers, and mmdet's Swin
merges patches in ``nn.Unfold``'s order. Sources: mmdet's
``tools/model_converters/groundingdino_to_mmdet.py`` and transformers'
``modeling_grounding_dino.py``; transformers' files keep the names of its version 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Optional

import torch
from mmdet.models.detectors import GroundingDINO
from torch import Tensor

from mmdet_gdino_lora.errors import ConfigError

OFFICIAL, TRANSFORMERS = 'official', 'transformers'

_SWIN = r'^backbone\.stages\.(\d+)\.blocks\.(\d+)\.'
_HF_SWIN = r'model.backbone.conv_encoder.model.encoder.layers.\1.blocks.\2.'
_HF_VISION = 'model.backbone.conv_encoder.model.'

_TABLES: dict[str, Sequence[tuple[str, str]]] = {
    OFFICIAL: (
        (r'^backbone\.patch_embed\.projection', 'backbone.0.patch_embed.proj'),
        (_SWIN + r'attn\.w_msa\.', r'backbone.0.layers.\1.blocks.\2.attn.'),
        (_SWIN + r'ffn\.layers\.0\.0', r'backbone.0.layers.\1.blocks.\2.mlp.fc1'),
        (_SWIN + r'ffn\.layers\.1', r'backbone.0.layers.\1.blocks.\2.mlp.fc2'),
        (r'^backbone\.stages\.', 'backbone.0.layers.'),
        (r'^backbone\.', 'backbone.0.'),
        (r'^language_model\.language_backbone\.body\.model\.', 'bert.'),
        (r'^text_feat_map\.', 'feat_map.'),
        (r'^neck\.convs\.(\d+)\.conv', r'input_proj.\1.0'),
        (r'^neck\.convs\.(\d+)\.gn', r'input_proj.\1.1'),
        (r'^level_embed$', 'transformer.level_embed'),
        (r'^memory_trans_fc\.', 'transformer.enc_output.'),
        (r'^memory_trans_norm\.', 'transformer.enc_output_norm.'),
        (r'^query_embedding\.', 'transformer.tgt_embed.'),
        (r'^(encoder\.(?:text_)?layers\.\d+)\.norms\.0', r'transformer.\1.norm1'),
        (r'^(encoder\.(?:text_)?layers\.\d+)\.norms\.1', r'transformer.\1.norm2'),
        (r'^(encoder\.text_layers\.\d+\.self_attn)\.attn\.', r'transformer.\1.'),
        (r'^(decoder\.layers\.\d+\.self_attn)\.attn\.', r'transformer.\1.'),
        (r'^(decoder\.layers\.\d+)\.cross_attn_text\.attn\.', r'transformer.\1.ca_text.'),
        (r'^(decoder\.layers\.\d+)\.norms\.0', r'transformer.\1.norm2'),
        (r'^(decoder\.layers\.\d+)\.norms\.1', r'transformer.\1.catext_norm'),
        (r'^(decoder\.layers\.\d+)\.norms\.2', r'transformer.\1.norm1'),
        (r'^(decoder\.layers\.\d+)\.norms\.3', r'transformer.\1.norm3'),
        (r'^((?:en|de)coder\.\w+\.\d+)\.ffn\.layers\.0\.0', r'transformer.\1.linear1'),
        (r'^((?:en|de)coder\.\w+\.\d+)\.ffn\.layers\.1', r'transformer.\1.linear2'),
        (r'^((?:en|de)coder\.)', r'transformer.\1'),
        (r'^bbox_head\.reg_branches\.(\d+)\.layers', r'transformer.decoder.bbox_embed.\1.layers'),
        (r'^bbox_head\.proposals\.layers', 'transformer.enc_out_bbox_embed.layers'),
    ),
    TRANSFORMERS: (
        (
            r'^backbone\.patch_embed\.projection',
            _HF_VISION + 'embeddings.patch_embeddings.projection',
        ),
        (r'^backbone\.patch_embed\.norm', _HF_VISION + 'embeddings.norm'),
        (_SWIN + r'attn\.w_msa\.relative', _HF_SWIN + 'attention.self.relative'),
        (_SWIN + r'attn\.w_msa\.qkv', _HF_SWIN + 'attention.self.{qkv}'),
        (_SWIN + r'attn\.w_msa\.proj', _HF_SWIN + 'attention.output.dense'),
        (_SWIN + r'norm1', _HF_SWIN + 'layernorm_before'),
        (_SWIN + r'norm2', _HF_SWIN + 'layernorm_after'),
        (_SWIN + r'ffn\.layers\.0\.0', _HF_SWIN + 'intermediate.dense'),
        (_SWIN + r'ffn\.layers\.1', _HF_SWIN + 'output.dense'),
        (r'^backbone\.stages\.', _HF_VISION + 'encoder.layers.'),
        (r'^backbone\.norm(\d+)', _HF_VISION + r'hidden_states_norms.stage\1'),
        (r'^language_model\.language_backbone\.body\.model\.', 'model.text_backbone.'),
        (r'^text_feat_map\.', 'model.text_projection.'),
        (r'^neck\.convs\.(\d+)\.conv', r'model.input_proj_vision.\1.0'),
        (r'^neck\.convs\.(\d+)\.gn', r'model.input_proj_vision.\1.1'),
        (r'^level_embed$', 'model.level_embed'),
        (r'^memory_trans_fc\.', 'model.enc_output.'),
        (r'^memory_trans_norm\.', 'model.enc_output_norm.'),
        (r'^query_embedding\.', 'model.query_position_embeddings.'),
        (r'^encoder\.layers\.(\d+)\.norms\.0', r'D\1.self_attn_layer_norm'),
        (r'^encoder\.layers\.(\d+)\.norms\.1', r'D\1.final_layer_norm'),
        (r'^encoder\.layers\.(\d+)\.ffn\.layers\.0\.0', r'D\1.fc1'),
        (r'^encoder\.layers\.(\d+)\.ffn\.layers\.1', r'D\1.fc2'),
        (r'^encoder\.layers\.(\d+)\.', r'D\1.'),
        (r'^encoder\.text_layers\.(\d+)\.self_attn\.attn\.in_proj_', r'T\1.self_attn.{qkv}.'),
        (r'^encoder\.text_layers\.(\d+)\.self_attn\.attn\.', r'T\1.self_attn.'),
        (r'^encoder\.text_layers\.(\d+)\.norms\.0', r'T\1.layer_norm_before'),
        (r'^encoder\.text_layers\.(\d+)\.norms\.1', r'T\1.layer_norm_after'),
        (r'^encoder\.text_layers\.(\d+)\.ffn\.layers\.0\.0', r'T\1.fc1'),
        (r'^encoder\.text_layers\.(\d+)\.ffn\.layers\.1', r'T\1.fc2'),
        (r'^encoder\.fusion_layers\.(\d+)\.gamma_v', r'F\1.vision_param'),
        (r'^encoder\.fusion_layers\.(\d+)\.gamma_l', r'F\1.text_param'),
        (r'^encoder\.fusion_layers\.(\d+)\.(.*)_v\.', r'F\1.\2_vision.'),
        (r'^encoder\.fusion_layers\.(\d+)\.(.*)_l\.', r'F\1.\2_text.'),
        (r'^encoder\.fusion_layers\.(\d+)\.(.*?)v_proj\.', r'F\1.\2vision_proj.'),
        (r'^encoder\.fusion_layers\.(\d+)\.(.*?)l_proj\.', r'F\1.\2text_proj.'),
        (r'^decoder\.layers\.(\d+)\.self_attn\.attn\.in_proj_', r'L\1.self_attn.{qkv}.'),
        (r'^decoder\.layers\.(\d+)\.self_attn\.attn\.', r'L\1.self_attn.'),
        (
            r'^decoder\.layers\.(\d+)\.cross_attn_text\.attn\.in_proj_',
            r'L\1.encoder_attn_text.{qkv}.',
        ),
        (r'^decoder\.layers\.(\d+)\.cross_attn_text\.attn\.', r'L\1.encoder_attn_text.'),
        (r'^decoder\.layers\.(\d+)\.cross_attn\.', r'L\1.encoder_attn.'),
        (r'^decoder\.layers\.(\d+)\.norms\.0', r'L\1.self_attn_layer_norm'),
        (r'^decoder\.layers\.(\d+)\.norms\.1', r'L\1.encoder_attn_text_layer_norm'),
        (r'^decoder\.layers\.(\d+)\.norms\.2', r'L\1.encoder_attn_layer_norm'),
        (r'^decoder\.layers\.(\d+)\.norms\.3', r'L\1.final_layer_norm'),
        (r'^decoder\.layers\.(\d+)\.ffn\.layers\.0\.0', r'L\1.fc1'),
        (r'^decoder\.layers\.(\d+)\.ffn\.layers\.1', r'L\1.fc2'),
        (r'^decoder\.norm\.', 'model.decoder.layer_norm.'),
        (r'^decoder\.ref_point_head\.', 'model.decoder.reference_points_head.'),
        (r'^bbox_head\.reg_branches\.(\d+)\.layers', r'bbox_embed.\1.layers'),
        (r'^bbox_head\.proposals\.layers', 'model.encoder_output_bbox_embed.layers'),
        (r'^bbox_head\.cls_branches\.(\d+)\.bias', r'class_embed.\1.bias'),
        (r'^bbox_head\.proposals\.bias', 'model.encoder_output_class_embed.bias'),
    ),
}  # fmt: skip

_HEADS = ('transformer.decoder.', '', 'model.decoder.')
"""Where the releases keep the decoder's box branches."""

_SHORT = {
    'D': r'model.encoder.layers.\1.deformable_layer.',
    'T': r'model.encoder.layers.\1.text_enhancer_layer.',
    'F': r'model.encoder.layers.\1.fusion_layer.',
    'L': r'model.decoder.layers.\1.',
}
"""What the letters in the table stand for."""

# Weights that the releases carry and mmdet has no use for, and the same weight by a second name.
_UNUSED = re.compile(
    r'position_ids$|relative_position_index$|\.pooler\.|^label_enc\.|bbox_embed\.|class_embed\.'
    r'|swin\.layernorm\.|attn_mask$'
)


def release_of(names: Iterable[str]) -> Optional[str]:
    """Tells which release a file's names belong to.

    Args:
        names: Of the weights.

    Returns:
        :data:`OFFICIAL`, :data:`TRANSFORMERS`, or None for mmdet's own.
    """
    names = list(names)
    if any(name.startswith(_HF_VISION) for name in names):
        return TRANSFORMERS
    if any(name.startswith('transformer.encoder.') for name in names):
        return OFFICIAL
    return None


def to_mmdet(
    weights: Mapping[str, Tensor], release: str, model_tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Brings weights of another release under mmdet's names and into mmdet's layout.

    Args:
        weights: As read from the file.
        release: See :func:`release_of`.
        model_tensors: Tensors of the plain detector that will take them.

    Returns:
        Tensors by plain name. Those that the detector has and the file lacks are missing; those
        that the file has beyond the detector keep their names, so that the caller finds them.
    """
    result: dict[str, Tensor] = {}
    used: set[str] = set()
    for name in model_tensors:
        sources = _first_present(_sources(name, release, model_tensors), weights)
        if sources:
            tensors = [weights[source] for source in sources]
            tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            if '.downsample.' in name:
                tensor = _merge_order(tensor, to_unfold=True)
            result[name] = (
                tensor.reshape(model_tensors[name].shape) if tensor.numel() == 1 else tensor
            )
            used.update(sources)
    result.update((n, w) for n, w in weights.items() if n not in used and not _UNUSED.search(n))
    return result


def from_mmdet(weights: Mapping[str, Tensor], release: str) -> dict[str, Tensor]:
    """Goes the way back of :func:`to_mmdet`.

    Args:
        weights: By mmdet's plain names.
        release: See :func:`release_of`.

    Returns:
        Tensors under the release's names. What mmdet alone has (the denoising label embedding,
        index tables) is left out.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith('dn_query_generator.') or _UNUSED.search(name):
            continue
        if '.downsample.' in name:
            tensor = _merge_order(tensor, to_unfold=False)
        sources = _sources(name, release, weights)[0]
        parts = list(tensor.chunk(len(sources)))
        if 'class_embed' in sources[0]:  # a number there, a vector of one here
            parts = [part.reshape(()) for part in parts]
        result.update((source, part.clone()) for source, part in zip(sources, parts))
    return result


def check_scores(detector: GroundingDINO, weights: Mapping[str, Tensor], release: str) -> None:
    """Checks that the detector computes scores from features as the release does.

    Args:
        detector: The plain detector.
        weights: Under mmdet's names.
        release: See :func:`release_of`.

    Raises:
        ConfigError: With the setting to change. Weights alone don't tell: scores would be wrong.
    """
    branch = detector.bbox_head.cls_branches[0]
    scaled = branch.log_scale not in (None, 'none')
    biased = branch.bias is not None
    has_bias = any(name.endswith('cls_branches.0.bias') for name in weights)
    if release == TRANSFORMERS and has_bias:  # transformers' MMGroundingDino
        wanted = dict(max_text_len=branch.max_text_len, log_scale='auto', bias=True)
        fits = scaled and biased
    else:
        wanted = dict(max_text_len=branch.max_text_len)
        fits = not scaled and not biased
    if not fits:
        raise ConfigError(
            f'the base is of the {release} release, whose scores are computed otherwise: set '
            f'model.bbox_head.contrastive_cfg={wanted!r}.'
        )


def _sources(name: str, release: str, names: Iterable[str]) -> list[list[str]]:
    """Lists where a weight may lie in the release: alternatives, each of one or three names."""
    translated = _positions(name, release, names)
    for pattern, replacement in _TABLES[release]:
        translated, count = re.subn(pattern, replacement, translated)
        if count:
            break
    for letter, meaning in _SHORT.items():
        translated = re.sub(rf'^{letter}(\d+)\.', meaning, translated)
    alternatives = [translated]
    found = re.match(r'(?:transformer\.decoder\.)?(bbox|class)_embed\.(\d+)\.(.*)', translated)
    if found:  # one branch shared by all layers is kept once
        kind, index, rest = found.groups()
        for i in (index, 0):
            alternatives += [f'{at}{kind}_embed.{i}.{rest}' for at in _HEADS]
    if '{qkv}' in translated:
        return [[translated.replace('{qkv}', part) for part in ('query', 'key', 'value')]]
    return [[alternative] for alternative in alternatives]


def _positions(name: str, release: str, names: Iterable[str]) -> str:
    """Brings numbers that mean something else in the releases into their form."""
    branch = re.match(r'bbox_head\.(reg|cls)_branches\.(\d+)\.(.*)', name)
    if branch:
        kind, index, rest = branch[1], int(branch[2]), branch[3]
        last = max(int(n.split('.')[2]) for n in names if n.startswith('bbox_head.reg_branches.'))
        if kind == 'reg':
            linear, key = rest.split('.')
            rest = f'layers.{int(linear) // 2}.{key}'
        return f'bbox_head.{"proposals" if index == last else f"{kind}_branches.{index}"}.{rest}'
    norm = re.match(r'backbone\.norm(\d+)\.(.*)', name)
    if norm and release == TRANSFORMERS:  # which counts stages from 1
        return f'backbone.norm{int(norm[1]) + 1}.{norm[2]}'
    extra = re.match(r'neck\.extra_convs\.(\d+)\.(.*)', name)
    if extra:
        count = len({n.split('.')[2] for n in names if n.startswith('neck.convs.')})
        return f'neck.convs.{count + int(extra[1])}.{extra[2]}'
    return name


def _first_present(
    alternatives: Sequence[Sequence[str]], weights: Mapping[str, Tensor]
) -> list[str]:
    for names in alternatives:
        if all(name in weights for name in names):
            return list(names)
    return []


def _merge_order(tensor: Tensor, *, to_unfold: bool) -> Tensor:
    """Reorders the four neighbours that a Swin stage merges.

    Elsewhere the input is a concatenation (00, 10, 01, 11) of blocks of channels; ``nn.Unfold``
    puts channels first, and (00, 01, 10, 11) within.
    """
    shape = tensor.shape
    order = [0, 2, 1, 3]
    if to_unfold:
        blocks = tensor.reshape(*shape[:-1], 4, shape[-1] // 4)[..., order, :]
        return blocks.transpose(-1, -2).reshape(shape)
    blocks = tensor.reshape(*shape[:-1], shape[-1] // 4, 4).transpose(-1, -2)
    return blocks[..., order, :].reshape(shape)

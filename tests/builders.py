"""Small real models and batches for the tests: everything is built, nothing is mocked."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import nn

import tests.everywhere  # noqa: F401

#: Of every process: pytest-xdist keeps the other cores busy.
THREADS = 1
WITH_MM = pytest.mark.skipif(
    not hasattr(transformers, 'MMGroundingDinoConfig'),
    reason='this transformers has no MM Grounding DINO: it came with 4.55',
)
WORDS = ['red', 'blue', 'green', 'dog', 'hot', 'cat', 'star'] + [
    'circle',
    'square',
    'bird',
    'small',
    'large',
    'person',
    'car',
]
SMALL_ENCODER = dict(
    num_layers=2,
    num_cp=0,
    layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=256, num_levels=4, dropout=0.0),
        ffn_cfg=dict(embed_dims=256, feedforward_channels=64, ffn_drop=0.0),
    ),
    text_layer_cfg=dict(
        self_attn_cfg=dict(num_heads=4, embed_dims=256, dropout=0.0),
        ffn_cfg=dict(embed_dims=256, feedforward_channels=64, ffn_drop=0.0),
    ),
    fusion_layer_cfg=dict(v_dim=256, l_dim=256, embed_dim=64, num_heads=4, init_values=1e-1),
)
SMALL_DECODER = dict(
    num_layers=3,
    return_intermediate=True,
    layer_cfg=dict(
        self_attn_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
        cross_attn_text_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
        cross_attn_cfg=dict(embed_dims=256, num_heads=8, dropout=0.0),
        ffn_cfg=dict(embed_dims=256, feedforward_channels=64, ffn_drop=0.0),
    ),
    post_norm_cfg=None,
)
ASSIGNER = dict(
    type='HungarianAssigner',
    match_costs=[
        dict(type='TokenFocalCost', weight=1.0),
        dict(type='BoxL1Cost', weight=5.0),
        dict(type='BoxGIoUCost', weight=2.0),
    ],
)


def tiny_text_model(folder: str) -> str:
    """Writes a two-layer BERT config and a word vocabulary that transformers loads offline.

    Args:
        folder: Where to write; created when missing.

    Returns:
        The folder.
    """
    os.makedirs(folder, exist_ok=True)
    letters = [chr(c) for c in range(ord('a'), ord('z') + 1)]
    vocab = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', '.', '?', '-', *WORDS, *letters]
    vocab += [f'##{letter}' for letter in letters]
    with open(os.path.join(folder, 'vocab.txt'), 'w', encoding='utf-8') as f:
        f.write('\n'.join(dict.fromkeys(vocab)) + '\n')
    config = dict(
        model_type='bert',
        architectures=['BertModel'],
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=len(dict.fromkeys(vocab)),
        max_position_embeddings=256,
    )
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(config, f)
    with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
        json.dump(dict(tokenizer_class='BertTokenizer', do_lower_case=True), f)
    return folder


def stock_cfg(text_dir: str, **overrides: Any) -> ConfigDict:
    """A Grounding DINO small enough for a unit test, in mmdet's own config language.

    Args:
        text_dir: Folder of the text model.
        **overrides: Top-level keys of the model config to replace.

    Returns:
        A model config of type ``GroundingDINO``.
    """
    cfg = dict(
        type='GroundingDINO',
        num_queries=30,
        with_box_refine=True,
        as_two_stage=True,
        data_preprocessor=dict(
            type='DetDataPreprocessor',
            mean=[123.675, 116.28, 103.53],
            std=[58.395, 57.12, 57.375],
            bgr_to_rgb=True,
            pad_mask=False,
        ),
        language_model=dict(
            type='BertModel',
            name=text_dir,
            max_tokens=256,
            pad_to_max=False,
            use_sub_sentence_represent=True,
            special_tokens_list=['[CLS]', '[SEP]', '.', '?'],
            add_pooling_layer=False,
            init_cfg=dict(type='Normal', layer=['Linear', 'Embedding'], std=0.5),
        ),
        backbone=dict(
            type='SwinTransformer',
            embed_dims=12,
            depths=[1, 1, 2, 1],
            num_heads=[1, 2, 3, 4],
            window_size=7,
            drop_path_rate=0.0,
            patch_norm=True,
            out_indices=(1, 2, 3),
            with_cp=False,
            convert_weights=False,
        ),
        neck=dict(
            type='ChannelMapper',
            in_channels=[24, 48, 96],
            kernel_size=1,
            out_channels=256,
            act_cfg=None,
            bias=True,
            norm_cfg=dict(type='GN', num_groups=32),
            num_outs=4,
        ),
        encoder=SMALL_ENCODER,
        decoder=SMALL_DECODER,
        positional_encoding=dict(num_feats=128, normalize=True, offset=0.0, temperature=20),
        bbox_head=dict(
            type='GroundingDINOHead',
            num_classes=len(WORDS),
            sync_cls_avg_factor=True,
            contrastive_cfg=dict(max_text_len=256, log_scale='auto', bias=True),
            loss_cls=dict(
                type='FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0
            ),
            loss_bbox=dict(type='L1Loss', loss_weight=5.0),
            loss_iou=dict(type='GIoULoss', loss_weight=2.0),
        ),
        dn_cfg=dict(
            label_noise_scale=0.5,
            box_noise_scale=1.0,
            group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=10),
        ),
        train_cfg=dict(
            assigner=dict(
                type='HungarianAssigner',
                match_costs=[
                    dict(type='BinaryFocalLossCost', weight=2.0),
                    dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
                    dict(type='IoUCost', iou_mode='giou', weight=2.0),
                ],
            )
        ),
        test_cfg=dict(max_per_img=30),
    )
    cfg.update(overrides)
    return _copied(cfg)


def detector_cfg(text_dir: str, **overrides: Any) -> ConfigDict:
    """As :func:`stock_cfg`, for ``LoRAGroundingDINO`` and its head.

    Args:
        text_dir: Folder of the text model.
        **overrides: Top-level keys to replace, such as ``lora`` or ``base_checkpoint``.

    Returns:
        A model config of type ``LoRAGroundingDINO``.
    """
    cfg = stock_cfg(text_dir)
    cfg.update(type='LoRAGroundingDINO', lora=dict(preset='decoder', r=4))
    cfg['language_model']['type'] = 'GroundingTextEncoder'
    cfg['bbox_head'] = dict(
        type='GroundingDINOCriterionHead',
        num_classes=len(WORDS),
        contrastive_cfg=dict(max_text_len=256, log_scale='auto', bias=True),
        criterion=dict(type='GroundingDINOCriterion'),
    )
    cfg['train_cfg'] = dict(assigner=ASSIGNER)
    # A ConfigDict's own update merges dicts, and would leave keys of the replaced ones.
    return _copied({**cfg, **overrides})


def _copied(cfg: dict) -> ConfigDict:
    # A deep copy, for mmdet's constructors write into their configs.
    return ConfigDict(json.loads(json.dumps(cfg)))


def build(text_dir: str, **overrides: Any) -> nn.Module:
    """Builds the small ``LoRAGroundingDINO`` from the running random numbers.

    ``tests/fixtures.py`` seeds them before every test, so two detectors of one test differ in what
    no file gave them: a weight that was not loaded cannot pass for one that was.

    Args:
        text_dir: Folder of the text model.
        **overrides: Top-level keys of :func:`detector_cfg` to replace.

    Returns:
        The detector.
    """
    return build_cfg(detector_cfg(text_dir, **overrides))


def build_stock(text_dir: str, **overrides: Any) -> nn.Module:
    """Builds mmdet's own small detector; its text encoder alone is exchanged, as it doesn't start.

    Args:
        text_dir: Folder of the text model.
        **overrides: Top-level keys of :func:`stock_cfg` to replace.

    Returns:
        The detector.
    """
    cfg = stock_cfg(text_dir, **overrides)
    cfg.language_model.type = 'GroundingTextEncoder'
    return build_cfg(cfg)


def build_cfg(cfg: ConfigDict) -> nn.Module:
    """Builds a detector and fills the one parameter that mmdet leaves to ``init_weights``.

    Until then it is whatever lay in that memory, NaN for one.

    Args:
        cfg: A model config.

    Returns:
        The detector.
    """
    detector = MODELS.build(cfg)
    if not cfg.get('base_checkpoint'):
        nn.init.normal_(detector.level_embed)
    return detector


def write_base(detector: nn.Module, path: str) -> str:
    """Writes a base checkpoint as mmdet would, no weight of it at its tell-tale initial value.

    Args:
        detector: Newly built; it is initialised and stirred.
        path: Of the file.

    Returns:
        The path.
    """
    detector.init_weights()
    with torch.no_grad():
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    torch.save(dict(meta={}, state_dict=detector.state_dict()), path)
    return path


def data_samples(
    names: Sequence[str], boxes_per_image: Sequence[int], size: int = 64, seed: int = 0
) -> list[DetDataSample]:
    """Ground truth as mmdet's loader hands it over (absolute xyxy boxes), with class names as text.

    Args:
        names: Class names, the same for every image.
        boxes_per_image: Number of boxes of each image.
        size: Height and width of the images in pixels.
        seed: Of the boxes and labels.

    Returns:
        One sample per image.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for img_id, count in enumerate(boxes_per_image):
        corner = rng.uniform(0, size * 0.6, (count, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(4, size * 0.4, (count, 2))], 1)
        sample = DetDataSample(
            metainfo=dict(
                img_id=img_id,
                img_shape=(size, size),
                ori_shape=(size, size),
                batch_input_shape=(size, size),
                pad_shape=(size, size),
                scale_factor=(1.0, 1.0),
                text=tuple(names),
                custom_entities=True,
            )
        )
        sample.gt_instances = InstanceData(
            bboxes=torch.from_numpy(boxes).float(),
            labels=torch.from_numpy(rng.integers(0, len(names), count)).long(),
        )
        samples.append(sample)
    return samples

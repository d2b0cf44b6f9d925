"""mmdet's own Grounding DINO configs, with the two lines, made small enough for a test."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import mmdet
from mmengine.config import Config

from tests.drawn_data import Drawer

FOLDER = Path(mmdet.__file__).parent / '.mim' / 'configs'
TWO_LINES = dict(
    custom_imports=dict(imports=['mmdet_gdino_lora'], allow_failed_imports=False),
    model=dict(type='LoRAGroundingDINO', lora=dict(preset='decoder', r=2)),
)
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def installed() -> list[str]:
    """Every config of the two folders, by its path under mmdet's configs."""
    folders = ('grounding_dino', 'mm_grounding_dino')
    paths = [path for folder in folders for path in sorted((FOLDER / folder).rglob('*.py'))]
    # without a model: pictures' categories, and the like
    return [str(p.relative_to(FOLDER)) for p in paths if p.name != 'override_category.py']


@cache
def _read(name: str) -> Config:
    return Config.fromfile(str(FOLDER / name))


def two_line_config(name: str) -> Config:
    """An installed config with the two lines.

    Args:
        name: As :func:`installed` has it.
    """
    cfg = Config(_plain(_read(name)))
    cfg.merge_from_dict(TWO_LINES)
    return cfg


def small_config(name: str, text_dir: str, drawer: Drawer) -> Config:
    """An installed config with the two lines, a small model and drawn data of its data sets' types.

    Args:
        name: As :func:`installed` has it.
        text_dir: Folder of the text model.
        drawer: Draws the data.

    Returns:
        The config; of its wrappers, pipelines, metrics, losses and optimizer nothing is changed but
        sizes and paths.
    """
    cfg = two_line_config(name)
    _shrink_model(cfg.model, text_dir)
    same = cfg.test_dataloader == cfg.val_dataloader and cfg.test_evaluator == cfg.val_evaluator
    for key in LOADERS[:2] if same else LOADERS:
        if cfg.get(key):
            files = drawer.draw(cfg[key].dataset)
            cfg[key].update(num_workers=0, persistent_workers=False)
            _shrink_pipelines(cfg[key].dataset, text_dir)
            _meet(cfg.get(key.replace('dataloader', 'evaluator')), files)
    if same:
        cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.pop('load_from', None)
    return cfg


def _plain(node: Any) -> Any:
    if isinstance(node, (Config, Mapping)):
        return {key: _plain(value) for key, value in node.items()}
    return type(node)(map(_plain, node)) if isinstance(node, (list, tuple)) else node


def _shrink_model(model: dict, text_dir: str) -> None:
    model.update(num_queries=12)
    model.language_model.update(name=text_dir)
    backbone = model.backbone
    backbone.init_cfg = None
    if backbone.type == 'SwinTransformer':
        backbone.update(
            embed_dims=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 3, 4], convert_weights=False
        )
        backbone.pop('pretrain_img_size', None)
        channels = [12 * 2**stage for stage in range(4)]
    else:
        backbone.update(depth=18, base_channels=8)
        channels = [8 * 2**stage for stage in range(4)]
    model.neck.in_channels = [channels[stage] for stage in backbone.out_indices]
    small = dict(feedforward_channels=32)
    model.encoder.update(num_layers=1, num_cp=min(model.encoder.get('num_cp', 0), 1))
    model.encoder.layer_cfg.ffn_cfg.update(small)
    model.encoder.text_layer_cfg.ffn_cfg.update(small)
    model.encoder.fusion_layer_cfg.update(embed_dim=32)
    model.decoder.update(num_layers=2)
    model.decoder.layer_cfg.ffn_cfg.update(small)
    model.dn_cfg.group_cfg.update(num_dn_queries=4)


def _shrink_pipelines(node: Any, text_dir: str) -> None:
    """Resizes and crops to a few pixels, and reads words with the test's vocabulary."""
    if isinstance(node, (list, tuple)):
        for part in node:
            _shrink_pipelines(part, text_dir)
        return
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if key == 'scale':
            node[key] = (48, 64)
        elif key == 'scales':
            node[key] = [(40, 64), (48, 64)]
        elif key == 'crop_size':
            node[key] = (44, 60)
        elif key == 'tokenizer_name':
            node[key] = text_dir
        else:
            _shrink_pipelines(value, text_dir)


def _meet(evaluator: Any, files: list[str]) -> None:
    """Lets the metrics read the files of their data sets."""
    if evaluator is None:
        return
    metrics = evaluator.metrics if 'metrics' in evaluator else evaluator
    metrics = metrics if isinstance(metrics, list) else [metrics]
    for metric, file in zip(metrics, files):
        if 'ann_file' in metric:
            metric.ann_file = file
        if 'outfile_path' in metric:
            metric.outfile_path = os.path.splitext(file)[0] + '_found.json'

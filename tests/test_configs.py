"""Every config that the package brings builds and trains, made small, on data of its format."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

import mmdet
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.runner import Runner

from mmdet_gdino_lora.engine.preflight import check_config
from mmdet_gdino_lora.lora import lora_state
from mmdet_gdino_lora.lora.store.base import load_base
from mmdet_gdino_lora.shipped import config_path, names
from tests.builders import build_cfg
from tests.drawn_data import Drawer
from tests.tool_run import ROOT, base_for, inside, small

NAMES = ('red star', 'hot dog', 'car')
#: The demo's, which tests/test_preflight.py trains; and all others, which need the network.
SHAPES = ('gdino_lora_shapes', 'gdino_pretrain_shapes')
OTHERS = [name for name in names() if name not in SHAPES]
MMDETS = Path(mmdet.__file__).parent / '.mim/configs'
PAGE = (ROOT / 'configs/README.md').read_text(encoding='utf-8')
#: The config of mmdet's that describes the same model.
STOCK = {
    'gdino_lora_coco': 'mm_grounding_dino/coco/grounding_dino_swin-t_finetune_16xb4_1x_coco.py',
    'gdino_lora_coco_swin-l': 'mm_grounding_dino/grounding_dino_swin-l_pretrain_all.py',
    'gdino_lora_coco_gdino-t': 'grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py',
    'gdino_lora_coco_gdino-b': 'grounding_dino/grounding_dino_swin-b_finetune_16xb2_1x_coco.py',
}


def small_config(name: str, text_dir: str, folder: Path) -> Config:
    """A config of ours on drawn data: a small model, one epoch, no validation."""
    with inside(folder, LANG_MODEL=text_dir):
        cfg = small(Config.fromfile(config_path(name)))
    drawer = Drawer(folder / 'data')
    for part in ('train', 'test'):
        dataset = cfg[f'{part}_dataloader'].dataset
        if dataset.type == 'CocoDataset':
            dataset.metainfo = dict(classes=NAMES)
        files = drawer.draw(dataset)
    if 'ann_file' in cfg.test_evaluator:
        cfg.test_evaluator.ann_file = files[0]
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.work_dir = str(folder / 'work')
    cfg.model.base_checkpoint = None
    # Without a base, and with a text model's folder that has no weights, they are drawn.
    cfg.model.language_model.init_cfg = dict(type='Normal', layer='Embedding', std=0.05)
    for layers in (cfg.model.encoder, cfg.model.decoder):
        layers.layer_cfg.ffn_cfg.feedforward_channels = 32
    cfg.model.encoder.text_layer_cfg.ffn_cfg.feedforward_channels = 32
    cfg.model.encoder.fusion_layer_cfg.embed_dim = 32
    if cfg.model.get('retain'):
        cfg.model.retain.names = ['green bird', 'person']
        cfg.model.base_checkpoint = base_for(cfg, str(folder / 'base.pth'))
    return cfg


@pytest.mark.parametrize('name', OTHERS)
def test_it_trains_and_predicts(name: str, text_dir: str, tmp_path: Path) -> None:
    cfg = small_config(name, text_dir, tmp_path)
    check_config(cfg, ['train'])
    runner = Runner.from_cfg(cfg)
    before = {n: p.detach().clone() for n, p in runner.model.named_parameters() if p.requires_grad}
    runner.train()
    after = dict(runner.model.named_parameters())
    moved = [n for n, weight in before.items() if not torch.equal(weight, after[n])]
    assert [n for n in moved if '.lora_B' in n]
    if name == 'gdino_lora_lvis' and find_spec('lvis') is None:
        return  # the data set it is tested on can't be read without that package
    batch = next(iter(runner.build_dataloader(cfg.test_dataloader)))
    runner.model.eval()
    with torch.no_grad():
        (found,) = runner.model.test_step(batch)
    assert torch.isfinite(found.pred_instances.scores).all()


@pytest.mark.parametrize('name', STOCK)
def test_its_model_is_mmdets(name: str) -> None:
    ours = Config.fromfile(config_path(name)).model
    stock = Config.fromfile(MMDETS / STOCK[name])
    for part in ('neck', 'encoder', 'decoder', 'positional_encoding', 'dn_cfg', 'num_queries'):
        assert ours[part] == stock.model[part], part
    assert ours.get('num_feature_levels') == stock.model.get('num_feature_levels')
    head, theirs = ours.bbox_head.contrastive_cfg, stock.model.bbox_head.contrastive_cfg
    assert dict(head) == dict(theirs)
    for key in ('embed_dims', 'depths', 'num_heads', 'window_size', 'out_indices'):
        assert ours.backbone[key] == stock.model.backbone[key], key
    if stock.get('load_from') and 'pretrain' not in STOCK[name]:  # that begins with an earlier base
        # OneDL's configs name its own mirror of the same file.
        assert Path(ours.base_checkpoint).name == Path(stock.load_from).name


def test_what_llmdets_files_hold_beside_the_detector_is_left_out(
    text_dir: str, tmp_path: Path
) -> None:
    cfg = small_config('gdino_lora_coco_llmdet-t', text_dir, tmp_path)
    base = base_for(cfg, str(tmp_path / 'base.pth'))
    content = torch.load(base, weights_only=False)
    weights = content.get('state_dict', content)
    weights['lmm.model.embed_tokens.weight'] = torch.zeros(3, 4)
    weights['connector.0.weight'] = torch.zeros(3, 4)
    torch.save(content, tmp_path / 'llmdet.pth')
    cfg.model.update(lora=None, retain=None, base_checkpoint=None)
    detector = build_cfg(cfg.model)
    load_base(detector, str(tmp_path / 'llmdet.pth'))
    assert lora_state(detector).base.source.endswith('llmdet.pth')


def test_the_page_and_the_index_know_every_config() -> None:
    rows = re.findall(r'^\| `([\w-]+)` \|', PAGE, flags=re.M)
    assert sorted(rows) == names()
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))
    (metafile,) = index['Import']
    models = yaml.safe_load((ROOT / metafile).read_text(encoding='utf-8'))['Models']
    assert sorted(model['Config'] for model in models) == [f'configs/{name}.py' for name in names()]
    for model in models:
        assert model['Name'] == os.path.basename(model['Config']).removesuffix('.py')

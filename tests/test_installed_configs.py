"""Every Grounding DINO config that mmdet installs, with the two lines, on data of its formats."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator
from mmengine.optim import build_optim_wrapper
from mmengine.registry import EVALUATOR
from torch import nn

from mmdet_gdino_lora.checks.packages import NEEDED
from mmdet_gdino_lora.engine.preflight import check_config
from mmdet_gdino_lora.errors import ConfigError
from tests.builders import build_cfg, data_samples
from tests.drawn_data import NAMES, Drawer
from tests.installed_configs import FOLDER, installed, small_config, two_line_config

#: What mmdet 3.3.0 installs; an empty folder must not pass.
CONFIGS = installed()


@pytest.fixture(scope='module')
def words(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a text model with BERT's real vocabulary, and next to no layers."""
    folder = tmp_path_factory.mktemp('words')
    for name in ('vocab.txt', 'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'):
        if os.path.isfile(f'{minilm}/{name}'):
            shutil.copy(f'{minilm}/{name}', folder)
    config = json.loads(Path(minilm, 'config.json').read_text())
    config.update(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    (folder / 'config.json').write_text(json.dumps(config))
    return str(folder)


def trains(cfg: Config) -> bool:
    """Whether the config's training data has texts: the others are for evaluation alone."""
    dataset = cfg.train_dataloader.dataset
    while 'dataset' in dataset or 'datasets' in dataset:
        dataset = dataset.get('dataset') or dataset.datasets[0]
    return bool(dataset.get('return_classes'))


def test_all_of_mmdets_configs_are_found() -> None:
    assert len(CONFIGS) >= 52
    evaluation_only = [name for name in CONFIGS if not trains(two_line_config(name))]
    assert len(evaluation_only) >= 17


@pytest.mark.parametrize('name', CONFIGS)
def test_an_installed_config_with_two_lines_does_all_that_it_says(
    name: str, words: str, tmp_path: Path
) -> None:
    cfg = small_config(name, words, Drawer(tmp_path / 'data'))
    detector = build_cfg(cfg.model).eval()
    missing = packages_missing(cfg)
    if missing:
        with pytest.raises(ConfigError, match=f'needs the package {missing}, .*pip install'):
            check_config(cfg, ['val'])
        predicted(detector, None)
    else:
        stages = ['val'] if cfg.val_dataloader == cfg.test_dataloader else ['val', 'test']
        check_config(cfg, stages)
        for stage in stages:
            dataset = DATASETS.build(cfg[f'{stage}_dataloader'].dataset)
            metrics = evaluated(detector, dataset, cfg[f'{stage}_evaluator'])
            assert metrics or cfg.val_evaluator.type == 'DumpODVGResults'
        predicted(detector, dataset)
    if trains(cfg):
        cfg.val_dataloader = cfg.val_cfg = cfg.val_evaluator = None
        check_config(cfg, ['train'])
        assert trained(detector, cfg)
    else:
        refused(two_line_config(name))


def packages_missing(cfg: Config) -> str:
    """A module that the config's evaluation imports, and that isn't installed."""
    kinds = set(_types((cfg.val_dataloader, cfg.val_evaluator)))
    modules = {NEEDED[kind][0] for kind in kinds if kind in NEEDED}
    return next((module for module in sorted(modules) if find_spec(module) is None), '')


def _types(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        if isinstance(node.get('type'), str):
            yield node['type']
        node = node.values()
    if not isinstance(node, str) and hasattr(node, '__iter__'):
        for part in node:
            yield from _types(part)


def evaluated(detector: nn.Module, dataset: Any, evaluator: Any) -> dict[str, Any]:
    """What mmengine's loop does, whose runner would take longer to build than the detector."""
    evaluator = EVALUATOR.build(evaluator) if 'metrics' in evaluator else Evaluator(evaluator)
    evaluator.dataset_meta = dataset.metainfo
    with torch.no_grad():
        for index in range(len(dataset)):
            batch = pseudo_collate([dataset[index]])
            outputs = detector.val_step(batch)
            losses = [output.loss for output in outputs if 'loss' in output]
            assert all(value.isfinite() for loss in losses for value in loss.values())
            samples = [output for output in outputs if 'loss' not in output]
            evaluator.process(data_samples=samples, data_batch=batch)
    return evaluator.evaluate(len(dataset))


def predicted(detector: nn.Module, dataset: Any) -> None:
    """Detects in the data's first picture; in any picture where there is no data set to read it."""
    if dataset is None:
        batch = dict(
            inputs=[torch.randint(0, 255, (3, 48, 64))], data_samples=data_samples(NAMES, [0])
        )
    else:
        batch = pseudo_collate([dataset[0]])
    with torch.no_grad():
        (sample,) = detector.test_step(batch)
    found = sample.pred_instances
    assert len(found.scores) > 0
    assert found.scores.isfinite().all() and found.bboxes.isfinite().all()
    assert len(found.label_names) == len(found.labels)


def trained(detector: nn.Module, cfg: Config) -> bool:
    """Takes one step on a picture of every kind of data set; tells whether adapters moved."""
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    parts = {type(item['data_samples'].text): item for item in _first_items(dataset)}
    wrapper = build_optim_wrapper(detector, cfg.optim_wrapper)
    before = {n: p.detach().clone() for n, p in detector.named_parameters() if '.lora_B' in n}
    losses = detector.train().train_step(pseudo_collate(list(parts.values())), wrapper)
    assert losses['loss'].isfinite()
    moved = [n for n, p in detector.named_parameters() if n in before and (p != before[n]).any()]
    return len(moved) > len(before) / 2


def _first_items(dataset: Any) -> Iterator[dict]:
    for part in getattr(dataset, 'datasets', [dataset])[:3]:
        yield part[0]


def refused(cfg: Config) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(cfg, ['train'])
    sentence = str(caught.value)
    assert '\n' not in sentence and 'for evaluation only' in sentence
    inherit = sentence.partition("inherit _base_='")[2].partition("'")[0]
    other = Config.fromfile(inherit.replace('mmdet::', f'{FOLDER}/'))
    assert trains(other) and other.model.backbone.depths == cfg.model.backbone.depths
    for key in ('train_dataloader=', 'optim_wrapper=', 'train_cfg='):
        assert key in sentence

"""Looks at a run's config before anything is built: are its files there, is in them what is meant?

mmdet would find a missing file minutes into the run, behind the model, and would never tell of
boxes that it drops. What the files of data sets hold is looked at in ``checks/``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS, HOOKS
from mmengine.hooks import Hook

from mmdet_gdino_lora.checks.adapter import check_lora, check_retain
from mmdet_gdino_lora.checks.arguments import check_model
from mmdet_gdino_lora.checks.coco_file import need_no_folder
from mmdet_gdino_lora.checks.dataset import check_coco
from mmdet_gdino_lora.checks.evaluation_only import check_texts_arrive
from mmdet_gdino_lora.checks.findings import Finding, tell
from mmdet_gdino_lora.checks.folder import check_folder, check_latest, check_overwriting
from mmdet_gdino_lora.checks.packages import check_packages
from mmdet_gdino_lora.checks.prompts import asked_for, check_prompts, prompts_of
from mmdet_gdino_lora.checks.resumed import check_resumed
from mmdet_gdino_lora.checks.run import check_run
from mmdet_gdino_lora.checks.walk import datasets_of, metrics_of
from mmdet_gdino_lora.checks.words import some
from mmdet_gdino_lora.engine.earlier import set_aside
from mmdet_gdino_lora.engine.unfit import check_amp, check_fit
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text.caption import clean_name


def check_config(cfg: Mapping[str, Any], stages: Sequence[str] = ('train', 'val')) -> None:
    """Checks a run's config.

    Args:
        cfg: The runner's config.
        stages: The loops that will run: some of ``'train'``, ``'val'`` and ``'test'``.

    Raises:
        ConfigError: one sentence with the config key, the value found there and the remedy.
    """
    if cfg.get('load_from'):
        # mmdet's tools put what the command line names there.
        tested = list(stages) == ['test']
        key = '--resume' if cfg.get('resume') else 'checkpoint' if tested else 'load_from'
        _need_file(key, cfg['load_from'])
    if (cfg.get('model') or {}).get('type') == 'LoRAGroundingDINO':
        check_fit(cfg)
    if 'train' in stages:
        check_amp(cfg)
    tell(check_run(cfg, stages))
    if 'train' in stages:
        tell(check_texts_arrive(cfg))
    tell(check_packages(cfg, stages))
    for stage in stages:
        for key, dataset in datasets_of(f'{stage}_dataloader', cfg.get(f'{stage}_dataloader')):
            prompts = prompts_of(dataset)
            taught = prompts if stage == 'train' or 'train' not in stages else _taught(cfg)
            if (prompts or taught) and _is_coco(dataset):
                tell(check_prompts(key, prompts, config_classes(key, dataset), taught))
            check_dataset(key, dataset, cfg.get('model') or {})
            if stage == 'train' and _is_coco(dataset):
                _check_retain(cfg, key, asked_for(dataset, config_classes(key, dataset)))
        for key, metric in metrics_of(f'{stage}_evaluator', cfg.get(f'{stage}_evaluator')):
            if metric.get('ann_file'):
                _need_file(f'{key}.ann_file', metric['ann_file'])
    tell(_check_model(cfg['model']))
    if cfg.get('work_dir'):
        tell(check_folder(cfg['work_dir']))


def _check_model(model: Mapping[str, Any]) -> Iterator[Finding]:
    yield from check_model(model)
    if model.get('type') == 'LoRAGroundingDINO':
        yield from check_lora(model.get('lora'))
        yield from check_retain(model.get('retain'))


def _check_retain(cfg: Mapping[str, Any], key: str, classes: Sequence[str]) -> None:
    """The same name can't be both taught by the data and held to the base."""
    retain = (cfg.get('model') or {}).get('retain')
    if not isinstance(retain, Mapping):
        return
    retained = {_as_prompted(name) for name in retain.get('names') or ()}
    both = [name for name in classes if _as_prompted(name) in retained]
    if both:
        raise ConfigError(
            f'model.retain.names holds {some(both)}, of the classes of {key}: the base would hold '
            'back what the data teaches; leave out of model.retain.names what is in the data'
        )


def _taught(cfg: Mapping[str, Any]) -> dict[str, str]:
    """What the captions of all training data say for category names."""
    data = datasets_of('train_dataloader', cfg.get('train_dataloader'))
    return {name: words for _, dataset in data for name, words in prompts_of(dataset).items()}


def _as_prompted(name: str) -> str:
    return clean_name(str(name)).strip().lower()


def check_start(cfg: Mapping[str, Any]) -> None:
    """Checks what a training run goes on from, and that it does not write over what it begins with.

    Args:
        cfg: The runner's config.

    Raises:
        ConfigError: The checkpoint to go on from is not there, or the one to begin from would be
            written over.
    """
    if cfg.get('resume') and not cfg.get('load_from') and cfg.get('work_dir'):
        tell(check_latest(cfg['work_dir'], 'resume=True'))
    tell(check_overwriting(cfg))


def check_dataset(key: str, dataset: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Checks that a data set's files are there and hold what can be learned from or measured on.

    Args:
        key: Where it stands in the config, such as ``train_dataloader.dataset``.
        dataset: Its config.
        model: The model's config.

    Raises:
        ConfigError: See :func:`check_config`.
    """
    if is_looked_at(key, dataset):
        classes = config_classes(key, dataset)
        tell(check_coco(key, dataset, classes, model, trains=key.startswith('train_')))


def is_looked_at(key: str, dataset: Mapping[str, Any]) -> bool:
    """Checks that a data set's files are there, and tells whether what they hold can be looked at.

    Args:
        key: Where it stands in the config.
        dataset: Its config.

    Returns:
        True for COCO's format on this machine.

    Raises:
        ConfigError: See :func:`check_config`.
    """
    root = dataset.get('data_root') or ''
    if root and not _is_remote(root) and not os.path.isdir(root):
        raise ConfigError(
            f'{key}.data_root={root!r}: no such folder{_seen_from(root)}; set data_root to the '
            f'folder that holds {dataset.get("ann_file") or "the annotations"}'
        )
    for name in ('ann_file', 'label_map_file'):
        if dataset.get(name):
            if _is_coco(dataset):
                need_no_folder(f'{key}.{name}', os.path.join(root, dataset[name]))
            _need_file(f'{key}.{name}', dataset[name], root)
    for number, step in enumerate(dataset.get('pipeline') or ()):
        if step.get('label_map_file'):
            _need_file(f'{key}.pipeline.{number}.label_map_file', step['label_map_file'])
    for name, folder in (dataset.get('data_prefix') or {}).items():
        path = os.path.join(root, folder)
        if isinstance(folder, str) and not _is_remote(path) and not os.path.isdir(path):
            raise ConfigError(
                f'{key}.data_prefix.{name}={folder!r}: no folder {path!r}{_seen_from(path)}; set '
                'it to the folder of the images, relative to data_root'
            )
    if not _is_coco(dataset):
        return False
    if not dataset.get('return_classes'):
        raise ConfigError(
            f'{key}.return_classes is not True: the class names, which Grounding DINO is prompted '
            'with, would not reach the model; set return_classes=True'
        )
    return not _is_remote(os.path.join(root, dataset['ann_file']))


@HOOKS.register_module()
class PreflightHook(Hook):
    """:func:`check_config` for runs that mmdet's own tools start.

    ``custom_hooks = [dict(type='PreflightHook')]``. By the time hooks run mmengine has opened the
    annotation files; what it read otherwise than meant, and the images, are still told.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Any) -> None:
        """Checks the runner's config.

        Args:
            runner: mmengine's runner.

        Raises:
            ConfigError: See :func:`check_config`.
        """
        loops = {
            'train': runner._train_loop,
            'val': runner._val_loop,
            'test': runner._test_loop,
        }
        check_config(runner.cfg, [stage for stage, loop in loops.items() if loop is not None])
        if runner._train_loop is not None:
            check_start(runner.cfg)

    def before_train(self, runner: Any) -> None:
        """Checks what a resumed run took from its checkpoint, and saves an earlier run's.

        Args:
            runner: mmengine's runner, with the checkpoint's state.

        Raises:
            ConfigError: The checkpoint's learning rate is not the config's.
        """
        if runner._resume and runner._has_loaded and runner.iter:
            optimizer = runner.optim_wrapper.state_dict()
            where = runner._load_from or 'the latest checkpoint'
            tell(check_resumed(runner.cfg, where, runner.epoch, runner.iter, optimizer))
        set_aside(runner.cfg)


def _class_of(dataset: Mapping[str, Any]) -> Any:
    return DATASETS.get(dataset['type']) if isinstance(dataset['type'], str) else dataset['type']


def _is_coco(dataset: Mapping[str, Any]) -> bool:
    """Whether labels come from a COCO file's categories the way ``CocoDataset`` makes them."""
    cls = _class_of(dataset)
    if not (isinstance(cls, type) and issubclass(cls, CocoDataset)):
        return False
    # mmdet comes without types, so that any class is a CocoDataset to mypy.
    return cls.load_data_list is CocoDataset.load_data_list  # type: ignore[attr-defined]


def config_classes(key: str, dataset: Mapping[str, Any]) -> Sequence[str]:
    """The names that a data set will use: the config's, else those written in its class.

    Args:
        key: Where it stands in the config.
        dataset: Its config.

    Returns:
        Class names.

    Raises:
        ConfigError: A name stands where a list of them is wanted.
    """
    classes = (dataset.get('metainfo') or {}).get('classes')
    if classes is None:
        return _class_of(dataset).METAINFO['classes']
    if not isinstance(classes, str):
        return classes
    if not os.path.isfile(classes):
        raise ConfigError(
            f'{key}.metainfo.classes={classes!r} is a string, which mmengine takes for a file of '
            f'names; a single class is written with a comma: classes=({classes!r},)'
        )
    return Path(classes).read_text(encoding='utf-8').splitlines()


def _need_file(key: str, value: str, root: str = '') -> None:
    path = os.path.join(root, value)
    if not _is_remote(path) and not os.path.isfile(path):
        named = '' if path == value else f' ({path!r})'
        raise ConfigError(
            f'{key}={value!r}: no such file{named}{_seen_from(path)}; set {key} to one that exists'
        )


def _is_remote(path: str) -> bool:
    """URLs and mmengine's storage backends (``s3://``, ``petrel:s3://``)."""
    return '://' in path


def _seen_from(path: str) -> str:
    return '' if os.path.isabs(path) else f', seen from {os.getcwd()}'

"""The runner's own keys: is each one read by somebody, and has it a value that a run can have?"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.runner import Runner

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.nearest import nearest

TOGETHER = dict(
    train=('train_dataloader', 'train_cfg', 'optim_wrapper'),
    val=('val_dataloader', 'val_cfg', 'val_evaluator'),
    test=('test_dataloader', 'test_cfg', 'test_evaluator'),
)
"""Keys that mmengine wants all of, or none, to run a loop."""

READ = {
    *inspect.signature(Runner.__init__).parameters,
    'activation_checkpointing',
    'compile',
    'custom_imports',
    'efficient_conv_bn_eval',
    'find_unused_parameters',
    'model_wrapper_cfg',
    'runner_type',
    'sync_bn',
    'tta_model',
    'tta_pipeline',
} - {'self', 'cfg'}
"""Keys at a config's top that mmengine or mmdet reads."""

VARIABLES = {
    'train_pipeline',
    'val_pipeline',
    'test_pipeline',
    'train_dataset',
    'val_dataset',
    'test_dataset',
    'train_loader',
    'val_loader',
    'val_evaluator_abs',
}
"""Names that resemble a key and are usual as variables of a config."""

OF_MMDET_2 = dict(
    checkpoint_config='default_hooks.checkpoint',
    evaluation='val_evaluator and train_cfg.val_interval',
    lr_config='param_scheduler',
    optimizer='optim_wrapper.optimizer',
    resume_from='resume=True and load_from',
)
"""Keys that an earlier mmdet read, and where their settings stand today."""

OF_THE_MODEL = (
    'base_checkpoint',
    'base_dtype',
    'check_adapters',
    'dn_cfg',
    'full_checkpoint',
    'lora',
    'retain',
    'train_box_head',
    'trainable',
)
"""Arguments of the detector, which are easily written one level too high."""


def check_run(cfg: Mapping[str, Any], stages: Sequence[str]) -> Iterator[Finding]:
    """Checks what a config says to mmengine's runner.

    Args:
        cfg: The runner's config.
        stages: The loops that will run: some of ``'train'``, ``'val'`` and ``'test'``.

    Yields:
        What was found.
    """
    yield from _unread_keys(cfg)
    yield from _missing_keys(cfg, stages)
    for stage in stages:
        yield from _loader(f'{stage}_dataloader', cfg.get(f'{stage}_dataloader'))
    if 'train' in stages:
        yield from _validation(cfg)
        yield from _learning_rate(cfg)


def _unread_keys(cfg: Mapping[str, Any]) -> Iterator[Finding]:
    """Keys that look as if they meant something; any other name is a variable of the config."""
    for key in cfg:
        if key in READ or key in VARIABLES:
            continue
        if key in OF_THE_MODEL:
            meant = f'write it inside of model=dict(...), as model.{key}'
        elif key in OF_MMDET_2:
            meant = f'mmdet 3 has {OF_MMDET_2[key]} in its place'
        else:
            near = nearest(key, READ, 0.85)
            meant = f'did you mean {near}?' if near else ''
        if meant and not _is_used(cfg, key):
            yield Finding(f'{key} at the top of the config is read by nobody; {meant}')


def _is_used(cfg: Mapping[str, Any], name: str) -> bool:
    """Tells whether a name is a variable whose value stands somewhere else in the config."""
    value = cfg[name]
    if not isinstance(value, (Mapping, list, tuple, str)):
        return False

    def holds(node: Any) -> bool:
        if _says(node, value):
            return True
        if isinstance(node, Mapping):
            return any(map(holds, node.values()))
        return isinstance(node, (list, tuple)) and any(map(holds, node))

    return any(holds(cfg[key]) for key in cfg if key != name)


def _says(node: Any, value: Any) -> bool:
    """Tells whether a part of a config is a value, or that merged with what a base says there."""
    if isinstance(node, Mapping) and isinstance(value, Mapping):
        return all(key in node and _says(node[key], inner) for key, inner in value.items())
    return bool(node == value)


def _missing_keys(cfg: Mapping[str, Any], stages: Sequence[str]) -> Iterator[Finding]:
    if not isinstance(cfg.get('model'), Mapping):
        yield Finding(
            f'model={cfg.get("model")!r}: the config describes no model; set model=dict(type=...) '
            'or take one from a _base_',
            fatal=True,
        )
    for stage, keys in TOGETHER.items():
        missing = [key for key in keys if cfg.get(key) is None]
        there = [key for key in keys if key not in missing]
        if missing and there:
            yield Finding(
                f'{_listed(missing)} {"is" if len(missing) == 1 else "are"} None and '
                f'{_listed(there)} {"is" if len(there) == 1 else "are"} not, and mmengine wants '
                f'all three of them or none; set {_listed(missing)}, or {_none(keys)} to leave '
                f'{stage} out',
                fatal=True,
            )
        elif missing and stage in stages and stage != 'val':
            yield Finding(
                f'{_none(keys)}: there is nothing to {stage}; set all three of them', fatal=True
            )


def _loader(key: str, loader: Any) -> Iterator[Finding]:
    if not isinstance(loader, Mapping):
        return
    size, workers = loader.get('batch_size', 1), loader.get('num_workers', 0)
    if not _is_whole(size, 1):
        yield Finding(
            f'{key}.batch_size={size!r} is no whole number above 0; set the number of images that '
            'one GPU takes in a step',
            fatal=True,
        )
    if not _is_whole(workers, 0):
        yield Finding(
            f'{key}.num_workers={workers!r} is no whole number from 0 on; set the number of '
            'processes that load images',
            fatal=True,
        )
    elif workers == 0 and loader.get('persistent_workers'):
        yield Finding(
            f'{key}.persistent_workers=True keeps workers, and {key}.num_workers=0 has none; set '
            'persistent_workers=False as well',
            fatal=True,
        )


def _validation(cfg: Mapping[str, Any]) -> Iterator[Finding]:
    best = ((cfg.get('default_hooks') or {}).get('checkpoint') or {}).get('save_best')
    lost = f', and default_hooks.checkpoint.save_best={best!r} keeps none' if best else ''
    meaning = f'no metric says when the model is at its best{lost}'
    if all(cfg.get(key) is None for key in TOGETHER['val']):
        yield Finding(
            f'{_none(TOGETHER["val"])}: the run is not validated, so that {meaning}; set them to '
            'validate'
        )
        return
    loop = cfg.get('train_cfg') or {}
    last = loop.get('max_epochs', loop.get('max_iters'))
    for key in ('val_interval', 'val_begin'):
        first = loop.get(key, 1)
        if _is_whole(first, 1) and _is_whole(last, 1) and first > last:
            ends = 'max_epochs' if 'max_epochs' in loop else 'max_iters'
            yield Finding(
                f'train_cfg.{key}={first} lies behind train_cfg.{ends}={last}: the run is never '
                f'validated, so that {meaning}; set {key} to at most {last}'
            )


def _learning_rate(cfg: Mapping[str, Any]) -> Iterator[Finding]:
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer')
    if not isinstance(optimizer, Mapping) or 'lr' not in optimizer:
        return
    rate = optimizer['lr']
    key = f'optim_wrapper.optimizer.lr={rate!r}'
    if isinstance(rate, str):
        yield Finding(f'{key} is a string; write a number above 0, without quotes', fatal=True)
    elif isinstance(rate, bool) or not isinstance(rate, (int, float)) or not math.isfinite(rate):
        yield Finding(f'{key} is no number above 0; set one, such as 0.0002', fatal=True)
    elif rate <= 0:
        yield Finding(
            f'{key}: nothing would be learned; set a number above 0, such as 0.0002', fatal=True
        )


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _listed(keys: Sequence[str]) -> str:
    return ' and '.join([', '.join(keys[:-1]), keys[-1]] if len(keys) > 1 else keys)


def _none(keys: Sequence[str]) -> str:
    return _listed([f'{key}=None' for key in keys])

"""What a run that goes on from a checkpoint takes from it, whatever the config says now."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from mmdet_gdino_lora.checks.findings import Finding


def check_checkpoint(
    cfg: Mapping[str, Any], path: str, content: Mapping[str, Any]
) -> Iterator[Finding]:
    """Checks that a checkpoint is one to go on from, as the config wants it.

    Args:
        cfg: The runner's config.
        path: Of the checkpoint.
        content: What it holds.

    Yields:
        What was found.
    """
    meta, optimizer = content.get('meta') or {}, content.get('optimizer')
    if 'epoch' not in meta or 'iter' not in meta or optimizer is None:
        yield Finding(
            f'--resume: {path} holds weights alone, and not where a run stood; to begin with these '
            'weights set load_from, to go on name a checkpoint of the run',
            fatal=True,
        )
        return
    yield from check_resumed(cfg, path, meta['epoch'], meta['iter'], optimizer)


def check_resumed(
    cfg: Mapping[str, Any], path: str, epoch: int, iteration: int, optimizer: Mapping[str, Any]
) -> Iterator[Finding]:
    """Checks that something is left to train, with the learning rate of the config.

    Args:
        cfg: The runner's config.
        path: Of the checkpoint, or another name of it.
        epoch: Epochs that the run has behind it.
        iteration: Iterations that it has behind it.
        optimizer: The optimizer's state, with ``param_groups``.

    Yields:
        What was found.
    """
    loop = cfg.get('train_cfg') or {}
    for key, done in dict(max_epochs=epoch, max_iters=iteration).items():
        last = loop.get(key)
        if isinstance(last, int) and done >= last:
            yield Finding(
                f'--resume: {path} is the end of its run, with {done} of train_cfg.{key}={last} '
                f'behind it, and nothing is left to train; raise train_cfg.{key} to go on'
            )
            return
    yield from _learning_rate(cfg, path, optimizer)


def _learning_rate(
    cfg: Mapping[str, Any], path: str, optimizer: Mapping[str, Any]
) -> Iterator[Finding]:
    """mmengine restores the optimizer, its learning rate included, and the config's is not read."""
    wrapper = cfg.get('optim_wrapper') or {}
    rate = (wrapper.get('optimizer') or {}).get('lr')
    groups = optimizer.get('param_groups') or ()
    rates = {g.get('initial_lr', None if cfg.get('param_scheduler') else g['lr']) for g in groups}
    # A scaled rate (auto_scale_lr) depends on the number of ranks, too.
    scaled = (cfg.get('auto_scale_lr') or {}).get('enable')
    if scaled or rates <= {None} or isinstance(rate, bool) or not isinstance(rate, (int, float)):
        return
    custom = (wrapper.get('paramwise_cfg') or {}).get('custom_keys') or {}
    factors = {1.0, *(entry.get('lr_mult', 1.0) for entry in custom.values())}
    theirs = sorted(value for value in rates if value is not None)
    wanted = [rate * factor for factor in factors]
    if any(math.isclose(one, other, rel_tol=1e-6) for one in theirs for other in wanted):
        return
    yield Finding(
        f'optim_wrapper.optimizer.lr={rate:g}, but {path} was trained with {theirs[-1]:g}, and a '
        f'resumed run keeps that one; set lr={theirs[-1]:g} to go on, or begin a new run from '
        f'these weights with load_from={path!r}',
        fatal=True,
    )

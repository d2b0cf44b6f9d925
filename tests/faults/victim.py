"""The process that a fault strikes: a run of the smallest model, ended as our tools end."""

from __future__ import annotations

import os
from typing import Any

import torch
from mmdet.utils import register_all_modules
from mmengine.runner import Runner

import tests.faults.injected  # noqa: F401
from gdino_lora import run
from mmdet_gdino_lora.files.read import read_file
from tests.builders import THREADS
from tests.faults.smallest import smallest

EPOCHS = 5
WORKERS = dict(num_workers=2, persistent_workers=True)


def train(
    settings: dict[str, Any], folder: str, *, resume: bool = False, hooks: tuple[dict, ...] = ()
) -> Runner:
    """Trains five epochs of two iterations, with a checkpoint after each.

    Args:
        settings: ``text_dir``, ``base``, and what replaces parts of the training loader.
        folder: The work dir.
        resume: Whether to go on from the last checkpoint.
        hooks: Further ones.

    Returns:
        The runner, after training.
    """
    ours = [dict(type='PreemptHook')]
    if not any(hook['type'] == 'NonFiniteHook' for hook in hooks):
        ours.append(dict(type='NonFiniteHook'))
    cfg = smallest(
        folder,
        settings['text_dir'],
        settings['base'],
        by_epoch=True,
        epochs=EPOCHS,
        resume=resume,
        hooks=[*ours, *hooks],
        launcher='pytorch' if 'RANK' in os.environ else 'none',
        batch_size=1 if 'RANK' in os.environ else 2,
    )
    if settings.get('images'):
        cfg.train_dataloader.dataset = dict(
            type='FileImages', folder=settings['images'], text_dir=settings['text_dir']
        )
    cfg.train_dataloader.update(settings.get('loader', {}))
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def as_a_tool(log: str, rank: dict[str, str], *arguments: Any, **keywords: Any) -> None:
    """Trains as ``tools/train.py`` does: a mistake is one sentence, and the status says it.

    Args:
        log: File that gets what the process says.
        rank: Environment of a rank, with ``MASTER_PORT``; empty for a process on its own.
        *arguments: As for :func:`train`.
        **keywords: The same.
    """
    with open(log, 'a', encoding='utf-8') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(rank)
    register_all_modules(init_default_scope=True)
    torch.set_num_threads(THREADS)
    if rank:
        torch.distributed.init_process_group('gloo')
    run(lambda: train(*arguments, **keywords))


def weights(folder: str) -> dict[str, torch.Tensor]:
    """Reads what a run has ended with.

    Args:
        folder: Its work dir.
    """
    return read_file(f'{folder}/epoch_{EPOCHS}.pth')['state_dict']

"""What a run's folder holds: its config, its checkpoint, and what was logged, put together."""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Optional

from mmdet_gdino_lora.errors import ConfigError

#: A curve's points: step and value.
Points = list[tuple[float, float]]

#: What a log's line of training has, and one of validation hasn't.
_OF_TRAINING = 'lr'
_BESIDE_METRICS = ('step', 'epoch', 'iter', 'time', 'data_time', 'memory')


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run's folder.

    Attributes:
        folder: As it was typed.
        config: The config that the run has written there.
        checkpoint: File of weights, or folder of an adapter.
        training: Logged lines of training, in the order of their steps.
        validation: Logged lines of validations, the same.
    """

    folder: str
    config: str
    checkpoint: str
    training: Sequence[Mapping[str, Any]]
    validation: Sequence[Mapping[str, Any]]


def read_run(folder: str, checkpoint: Optional[str] = None) -> Run:
    """Looks through a run's folder.

    Args:
        folder: ``work_dir`` of the run.
        checkpoint: What to take in place of the best, or else the last, one in there.

    Returns:
        What is there.

    Raises:
        ConfigError: There is no run, no config, or no checkpoint.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f'work_dir {folder!r}: no such folder; give the work_dir of a run')
    logs = sorted(glob.glob(os.path.join(glob.escape(folder), '*', 'vis_data')))
    weights = glob.glob(os.path.join(glob.escape(folder), '*.pth'))
    if not logs and not weights:
        raise ConfigError(
            f'work_dir {folder!r} holds no training run: neither */vis_data/ nor a checkpoint; '
            'give the folder that training wrote its checkpoints to'
        )
    config = _config(folder, logs)
    if checkpoint is None:
        checkpoint = _checkpoint(folder, weights)
    elif not os.path.exists(checkpoint):
        raise ConfigError(f'--checkpoint {checkpoint!r}: no such file or folder')
    training, validation = read_logs(logs)
    return Run(folder, config, checkpoint, training, validation)


def _config(folder: str, logs: Sequence[str]) -> str:
    written = glob.glob(os.path.join(glob.escape(folder), '*.py'))
    written = written or [path for log in logs for path in glob.glob(f'{glob.escape(log)}/*.py')]
    if not written:
        raise ConfigError(
            f'work_dir {folder!r} holds no config, which training writes there as NAME.py; copy '
            "the run's config into it"
        )
    return max(written, key=os.path.getmtime)


def _checkpoint(folder: str, weights: Sequence[str]) -> str:
    best = [path for path in weights if os.path.basename(path).startswith('best_')]
    named = os.path.join(folder, 'last_checkpoint')
    if not best and os.path.isfile(named):
        with open(named, encoding='utf-8') as file:
            # It may name a path on another machine, or from where training was typed.
            last = os.path.join(folder, os.path.basename(file.read().strip()))
        weights = [last] if os.path.isfile(last) else weights
    if not weights:
        raise ConfigError(
            f'work_dir {folder!r} holds no checkpoint (*.pth); name one with --checkpoint'
        )
    return max(best or weights, key=os.path.getmtime)


def read_logs(logs: Sequence[str]) -> tuple[list[dict], list[dict]]:
    """Puts the logs of a run together, which has one for each time that it was started.

    A run that is resumed goes back to its last checkpoint: what an earlier log says of later steps
    was done again. One that begins anew in the same folder starts at the first step, so nothing of
    the earlier ones is left.

    Args:
        logs: Folders ``vis_data``, in the order of their starts.

    Returns:
        The lines of training, and those of validations.
    """
    lines: list[tuple[float, dict]] = []
    for log in logs:
        new = list(_with_steps(log))
        # A test in the same folder leaves a log without training.
        if any(_OF_TRAINING in line for _, line in new):
            lines = [(at, line) for at, line in lines if at < new[0][0]] + new
    training = [line for _, line in lines if _OF_TRAINING in line]
    return training, [line for _, line in lines if _OF_TRAINING not in line]


def _with_steps(log: str) -> Iterator[tuple[float, dict]]:
    """A log's lines, each with the training step that it was written at or after."""
    files = glob.glob(os.path.join(glob.escape(log), 'scalars.json'))
    # mmengine writes each line into scalars.json and into a file with the time of the start.
    files = files or sorted(glob.glob(os.path.join(glob.escape(log), '*.json')))
    at = 0.0
    for path in files[:1]:
        with open(path, encoding='utf-8') as file:
            for text in file:
                try:
                    line = json.loads(text)
                except json.JSONDecodeError:  # the run was killed while it wrote
                    continue
                at = line.get('step', at) if _OF_TRAINING in line else at
                yield at, line


def curves(lines: Sequence[Mapping[str, Any]], wanted: str, points: int = 200) -> dict[str, Points]:
    """Takes curves out of a log.

    Args:
        lines: Of :func:`read_logs`.
        wanted: Regular expression that a curve's whole name fits.
        points: Most points of a curve; neighbours are averaged.

    Returns:
        Points by name. Values that are NaN, infinite, or mmdet's -1 for "none" are left out.
    """
    found: dict[str, Points] = {}
    for line in lines:
        for name, value in line.items():
            if name in _BESIDE_METRICS or not re.fullmatch(wanted, name):
                continue
            if isinstance(value, (int, float)) and abs(value) < float('inf') and value != -1:
                found.setdefault(name, []).append((line.get('step', 0), value))
    return {name: _thinned(curve, points) for name, curve in found.items()}


def _thinned(curve: Points, points: int) -> Points:
    size = -(-len(curve) // points)
    parts = [curve[begin : begin + size] for begin in range(0, len(curve), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]

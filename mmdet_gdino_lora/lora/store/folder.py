"""Adapter folders in PEFT's format, and plain checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdet_gdino_lora.engine.atomic import atomic, write_whole
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.inject.report import describe
from mmdet_gdino_lora.lora.state import lora_state
from mmdet_gdino_lora.lora.store.base import read_weights, unrounded
from mmdet_gdino_lora.lora.store.checkpoint import RECORD, checked_note, record
from mmdet_gdino_lora.lora.tensors import (
    ADAPTER,
    LABEL_EMBEDDING,
    base_name,
    is_factor,
    named_tensors,
)
from mmdet_gdino_lora.peft_layers.layers import adapter_layers, is_adapted

PEFT_PREFIX = 'base_model.model.'
WEIGHTS = 'adapter_model.safetensors'
_OLDER_WEIGHTS = 'adapter_model.bin'
_FILES_OF_WEIGHTS = ('.pth', '.pt', '.bin', '.safetensors')
FILES = ('adapter_config.json', WEIGHTS, 'README.md')
"""What an adapter's folder holds."""


def write_weights(
    path: str, weights: Mapping[str, Tensor], meta: Optional[Mapping[str, Any]] = None
) -> None:
    """Writes a plain checkpoint, atomically.

    Args:
        path: ``.safetensors``, or ``.pth`` in mmengine's form.
        weights: By plain name.
        meta: Goes into the checkpoint's ``meta``; class names and the like.
    """
    with atomic(path) as partial:
        if path.endswith('.safetensors'):
            plain = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(plain, partial, metadata={'format': 'pt'})
        else:
            torch.save(dict(meta=dict(meta or {}), state_dict=dict(weights)), partial)


def export_adapter(
    detector: nn.Module,
    folder: str,
    *,
    classes: Sequence[str] = (),
    metrics: Optional[Mapping[str, float]] = None,
    weights: Optional[Mapping[str, Tensor]] = None,
) -> None:
    """Writes the adapter in PEFT's own format, with a model card.

    ``peft.PeftModel.from_pretrained(detector, folder)`` loads it onto mmdet's plain detector with
    the same base. Parameters trained beside the adapters become PEFT's ``modules_to_save``. The
    denoising label embedding stays out, as only training reads it.

    Args:
        detector: Tuned.
        folder: Created if missing; files in it are replaced one by one, the weights last.
        classes: Class names, for the card.
        metrics: For the card.
        weights: A state dict of the detector to write instead of what it holds now, such as the
            average that mmengine's ``EMAHook`` puts into checkpoints.

    Raises:
        ConfigError: For a freed parameter that PEFT's format has no place for.
    """
    config = lora_state(detector).adapter_config
    saved = _saved_modules(detector)
    exported = dataclasses.replace(
        config,
        modules_to_save=saved or None,
        inference_mode=True,
        base_model_name_or_path=_base_source(detector),
    )
    fields = {k: sorted(v) if isinstance(v, set) else v for k, v in exported.to_dict().items()}
    # A state dict holds the trained adapter, whatever is switched on.
    tensors = {**named_tensors(detector), **(weights or detector.state_dict())}
    write_whole(os.path.join(folder, 'adapter_config.json'), json.dumps(fields, indent=2) + '\n')
    write_card(detector, folder, classes=classes, metrics=metrics)
    with atomic(os.path.join(folder, WEIGHTS)) as partial:
        save_file(
            _peft_weights(detector, saved, tensors),
            partial,
            metadata={'format': 'pt', RECORD: json.dumps(record(detector))},
        )


def read_folder(folder: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads an adapter folder in PEFT's format.

    Args:
        folder: As :func:`export_adapter`, or PEFT, writes it.

    Returns:
        Weights by plain name, without adapter names; and the record that came with them, empty
        where there is none.

    Raises:
        ConfigError: It holds no adapter, or the file is damaged.
    """
    paths = [os.path.join(folder, name) for name in (WEIGHTS, _OLDER_WEIGHTS)]
    path = next(filter(os.path.isfile, paths), None)
    if path is None:
        raise ConfigError(
            f'{folder} is a folder without {WEIGHTS}, and so no adapter; give the folder that '
            'tools/export_adapter.py wrote, or a checkpoint'
        )
    weights = {name.removeprefix(PEFT_PREFIX): w for name, w in read_weights(path).items()}
    return weights, _note_in(path)


def _note_in(path: str) -> dict[str, Any]:
    """The record in a safetensors file's metadata; PEFT's older ``.bin`` has none."""
    if not path.endswith('.safetensors'):
        return {}
    with safe_open(path, 'pt') as file:
        text = (file.metadata() or {}).get(RECORD, 'null')
    try:
        note = json.loads(text)
    except (ValueError, RecursionError):
        note = text
    return checked_note(note, path)


def folder_as_checkpoint(detector: nn.Module, folder: str) -> dict[str, Any]:
    """Reads an adapter folder in the form of a training run's checkpoint.

    Args:
        detector: The one that will load it, with an adapter of the same config.
        folder: As for :func:`read_folder`.

    Returns:
        What mmengine's checkpoints hold: a ``state_dict`` with the adapter's record, and ``meta``.

    Raises:
        ConfigError: As :func:`read_folder`; or the detector has no adapter to load it into.
    """
    weights, note = read_folder(folder)
    if lora_state(detector).config is None:
        raise ConfigError(
            f'{folder} holds an adapter, but the config sets no model.lora; use the config that it '
            'was trained with'
        )
    own = {without_adapter_name(n): n for n in named_tensors(detector) if is_factor(n, ADAPTER)}
    # PEFT leaves out the last part of a DoRA magnitude's name.
    own.update({name.removesuffix('.weight'): n for name, n in own.items() if 'magnitude' in name})
    own = {base_name(name): n for name, n in own.items()}
    state_dict = OrderedDict((own.get(base_name(n), n), w) for n, w in weights.items())
    # Where torch keeps what belongs to a module's state and is no tensor.
    vars(state_dict)['_metadata'] = {'': {RECORD: note}} if note else {}
    return dict(meta={}, state_dict=state_dict)


def without_adapter_name(name: str, adapter: str = ADAPTER) -> str:
    """The name that a factor has in a file.

    Args:
        name: Of a parameter.
        adapter: The adapter's name in the detector.

    Returns:
        The name without it; other parameters' names as they are.
    """
    if not is_factor(name):
        return name
    return name.replace(f'.{adapter}.', '.').removesuffix(f'.{adapter}')


def write_card(
    detector: nn.Module,
    folder: str,
    *,
    classes: Sequence[str] = (),
    metrics: Optional[Mapping[str, float]] = None,
) -> None:
    """Writes the model card of an adapter's folder, and nothing else.

    Args:
        detector: Tuned.
        folder: Created if missing.
        classes: Class names.
        metrics: Of the weights in the folder.
    """
    write_whole(os.path.join(folder, 'README.md'), _card(detector, classes, metrics or {}) + '\n')


def _peft_weights(
    detector: nn.Module, saved: Sequence[str], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Collects weights of the adapter and of modules that it replaces, under PEFT's names."""
    weights = get_peft_model_state_dict(detector, state_dict=dict(tensors))
    within = tuple(f'{name}.' for name in saved)
    # Modules are replaced whole, with what is frozen in them.
    modules = {n: t for n, t in tensors.items() if within and n.startswith(within)}
    weights.update(unrounded(detector, modules))
    return {PEFT_PREFIX + n: t.detach().cpu().contiguous() for n, t in weights.items()}


def _base_source(detector: nn.Module) -> Optional[str]:
    base = lora_state(detector).base
    return base.source if base else None


def _saved_modules(detector: nn.Module) -> list[str]:
    """Lists the modules whose weights the adapter replaces whole."""
    layers = adapter_layers(detector)
    changed = lora_state(detector).names_to_save(detector)
    saved: dict[str, None] = {}
    for name in sorted(n for n in changed if not is_factor(n)):
        plain = base_name(name)
        if plain == LABEL_EMBEDDING:
            continue
        owner = plain.rpartition('.')[0]
        if not owner or any(owner == a or owner.startswith(f'{a}.') for a in layers):
            raise ConfigError(
                f"{plain} differs from the base's, and PEFT's format has no place for it; use "
                'tools/merge_adapter.py instead.'
            )
        if not is_adapted(detector.get_submodule(owner)):
            saved[owner] = None
    return list(saved)


def _base_model(base: str) -> list[str]:
    """The card's line on the base, where that is on the hub, which refuses other values."""
    on_hub = re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', base) and not base.endswith(_FILES_OF_WEIGHTS)
    return [f'base_model: {json.dumps(base)}'] if on_hub and not os.path.exists(base) else []


def _card(detector: nn.Module, classes: Sequence[str], metrics: Mapping[str, float]) -> str:
    state, report = lora_state(detector), describe(detector)
    base = _base_source(detector) or 'random weights'
    lines = [
        '---',
        'library_name: peft',
        *_base_model(base),
        'pipeline_tag: zero-shot-object-detection',
        'tags: [lora, grounding-dino, mmdetection]',
        '---',
        '',
        '# Grounding DINO adapter',
        '',
        f'- base: `{state.base or base}`',
        f'- preset: `{state.preset}`, {len(state.targets)} modules, r={state.adapter_config.r}, '
        f'alpha={state.adapter_config.lora_alpha}',
        f'- trained: {report.num_trained:,} of {report.total:,} parameters',
    ]
    if classes:
        lines.append(f'- classes: {", ".join(classes)}')
    if metrics:
        lines += ['', '| metric | value |', '|---|---|']
        numbers = {n: v if isinstance(v, str) else f'{v:.4g}' for n, v in metrics.items()}
        lines += [f'| {name} | {number} |' for name, number in numbers.items()]
    return '\n'.join(
        [
            *lines,
            '',
            "On mmdet's detector with the base loaded:",
            '',
            '```python',
            'from peft import PeftModel',
            'detector = PeftModel.from_pretrained(detector, folder)',
            '```',
        ]
    )

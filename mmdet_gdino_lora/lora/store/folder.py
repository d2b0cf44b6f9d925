"""Adapter folders in PEFT's format, and plain checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Optional

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from mmdet_gdino_lora.engine.atomic import atomic
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.inject.report import describe
from mmdet_gdino_lora.lora.state import lora_state
from mmdet_gdino_lora.lora.store.base import unrounded
from mmdet_gdino_lora.lora.store.checkpoint import RECORD, record
from mmdet_gdino_lora.lora.tensors import LABEL_EMBEDDING, base_name, is_factor, named_tensors
from mmdet_gdino_lora.peft_layers.layers import adapter_layers, is_adapted

PEFT_PREFIX = 'base_model.model.'


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
    _write_text(os.path.join(folder, 'adapter_config.json'), json.dumps(fields, indent=2))
    write_card(detector, folder, classes=classes, metrics=metrics)
    with atomic(os.path.join(folder, 'adapter_model.safetensors')) as partial:
        save_file(
            _peft_weights(detector, saved, tensors),
            partial,
            metadata={'format': 'pt', RECORD: json.dumps(record(detector))},
        )


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
    _write_text(os.path.join(folder, 'README.md'), _card(detector, classes, metrics or {}))


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


def _write_text(path: str, text: str) -> None:
    with atomic(path) as partial, open(partial, 'w', encoding='utf-8') as file:
        file.write(text + '\n')


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


def _card(detector: nn.Module, classes: Sequence[str], metrics: Mapping[str, float]) -> str:
    state, report = lora_state(detector), describe(detector)
    base = _base_source(detector) or 'random weights'
    lines = [
        '---',
        'library_name: peft',
        f'base_model: {json.dumps(base)}',
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

"""Putting an adapter on a detector and freezing the rest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import MMLogger
from peft import LoraConfig
from torch import Tensor, nn

from mmdet_gdino_lora.checks.adapter import check_lora
from mmdet_gdino_lora.checks.findings import tell
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.inject.config import (
    DEFAULT_PRESET,
    check_variant,
    lora_config,
    plain_fields,
    resolve_targets,
)
from mmdet_gdino_lora.lora.inject.freezing import free_parameters, free_patterns
from mmdet_gdino_lora.lora.inject.presets import as_pattern
from mmdet_gdino_lora.lora.inject.report import Report, describe
from mmdet_gdino_lora.lora.state import Injection, lora_state
from mmdet_gdino_lora.lora.tensors import ADAPTER, base_name, buffers_beside, plain_tensors
from mmdet_gdino_lora.peft_layers.insertion import insert, reads_base


def inject(
    detector: nn.Module,
    lora: Mapping[str, Any],
    *,
    train_box_head: bool = True,
    trainable: Sequence[str] = (),
) -> Report:
    """Injects one LoRA adapter with PEFT and freezes whatever is not trained.

    Args:
        detector: With its base weights loaded: adapters that start from the base (PiSSA, OLoRA,
            DoRA) read them here.
        lora: Fields of ``peft.LoraConfig`` and ``preset`` (see :mod:`.presets`). Without
            ``preset`` and ``target_modules``, the preset is ``decoder``; with both, both count.
            Modules in ``modules_to_save`` are trained whole.
        train_box_head: Whether the box regression branches are trained.
        trainable: Patterns (``re.search`` on parameter names) of further parameters to train.

    Returns:
        What is trained now; also written to mmengine's log as a table.

    Raises:
        ConfigError: For a key that ``LoraConfig`` doesn't have, an unknown preset, a target or
            pattern that matches nothing, or a variant that PEFT can't apply to a kind of layer.
    """
    fields = _checked(lora)
    preset = fields.pop('preset', None)
    config = lora_config(fields)
    targets = resolve_targets(detector, config, preset, train_box_head)
    patterns = free_patterns(detector, config, train_box_head, trainable)
    config = dataclasses.replace(
        config,
        target_modules=as_pattern(targets, [name for name, _ in detector.named_modules()]),
        exclude_modules=None,
        modules_to_save=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    check_variant(config, detector, targets)
    _check_base(detector, config)
    before = _weights_at_risk(detector, config, targets)
    try:
        insert(config, detector, ADAPTER)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ConfigError(f'lora={fields}: PEFT refuses to inject this adapter: {error}') from error
    free_parameters(detector, patterns)
    trained = {name for name, p in detector.named_parameters() if p.requires_grad}
    now = plain_tensors(detector)
    injection = Injection(
        config=config,
        preset=preset if preset or fields.get('target_modules') else DEFAULT_PRESET,
        targets=tuple(targets),
        trained=frozenset(map(base_name, trained)),
        buffers=frozenset(map(base_name, buffers_beside(detector, trained))),
        rewritten=frozenset(n for n, weight in before.items() if not torch.equal(weight, now[n])),
    )
    lora_state(detector).injected(injection)
    report = describe(detector)
    MMLogger.get_current_instance().info('LoRA injected:\n%s', report.table())
    return report


def _checked(lora: Any) -> dict[str, Any]:
    tell(finding for finding in check_lora(lora) if finding.fatal)
    return plain_fields(lora)


def _check_base(detector: nn.Module, config: LoraConfig) -> None:
    if reads_base(config) and lora_state(detector).base is None:
        raise ConfigError(
            f'lora.init_lora_weights={config.init_lora_weights!r} with lora.use_dora='
            f'{config.use_dora} starts from the weights of the base, which load_from would bring '
            'too late: use base_checkpoint= in the model instead.'
        )


def _weights_at_risk(
    detector: nn.Module, config: LoraConfig, targets: Sequence[str]
) -> dict[str, Tensor]:
    """Copies of the weights that the adapter's initialisation may change."""
    if not reads_base(config):
        return {}
    inside = tuple(f'{target}.' for target in targets)
    return {n: w.clone() for n, w in plain_tensors(detector).items() if n.startswith(inside)}

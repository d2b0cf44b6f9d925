"""The user's ``lora=dict(...)`` as a config of PEFT's, checked against the detector."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.logging import MMLogger
from peft import LoraConfig
from torch import nn

from mmdet_gdino_lora.checks.findings import tell
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.inject.presets import (
    adaptable_modules,
    frozen_by_backbone,
    preset_targets,
    user_targets,
)
from mmdet_gdino_lora.lora.inject.size import check_size
from mmdet_gdino_lora.lora.tensors import ADAPTER
from mmdet_gdino_lora.peft_layers.insertion import insert, matches

DEFAULT_PRESET = 'decoder'


def plain_fields(value: Any) -> Any:
    """mmengine's config containers as plain dicts and lists, which PEFT can write as JSON.

    Args:
        value: A config or a value in one.

    Returns:
        The same of Python's own types.
    """
    if isinstance(value, Mapping):
        return {key: plain_fields(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain_fields(item) for item in value]
    return value


def lora_config(fields: Mapping[str, Any]) -> LoraConfig:
    """PEFT's config from the fields that the user gave.

    Args:
        fields: Of ``peft.LoraConfig``.

    Returns:
        The config, with an empty list of targets where the user gave none, and twice the rank for
        ``lora_alpha``: PEFT's own 8 would weaken an adapter the more the higher its rank.

    Raises:
        ConfigError: For a key or a value that it doesn't take.
    """
    if fields.get('target_modules') == 'all-linear':
        raise ConfigError("lora.target_modules='all-linear': write lora.preset='all' instead.")
    fields = {'target_modules': [], **fields}
    rank = fields.get('r', LoraConfig().r)
    if 'lora_alpha' not in fields and isinstance(rank, int):
        fields['lora_alpha'] = 2 * rank
        MMLogger.get_current_instance().info(
            'lora.lora_alpha is not set and becomes twice the rank: %d', 2 * rank
        )
    try:
        return LoraConfig(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f'lora={dict(fields)}: peft.LoraConfig says: {error}') from error


def resolve_targets(
    detector: nn.Module, config: LoraConfig, preset: Any, train_box_head: bool
) -> list[str]:
    """The modules that get adapters.

    Args:
        detector: A detector that has not been injected yet.
        config: With ``target_modules`` and what narrows them.
        preset: As in the user's config, or None.
        train_box_head: Whether the box regression branches are trained whole.

    Returns:
        Names of modules, in the order of the module tree.

    Raises:
        ConfigError: For targets that match nothing, or only what can't learn.
    """
    wanted: list[str] = []
    if preset or not config.target_modules:
        names = preset_targets(detector, preset or DEFAULT_PRESET, train_box_head=train_box_head)
        # These are whole names: all that the config can do to them is to leave some out.
        probe = dataclasses.replace(config, target_modules=names)
        wanted += [name for name in names if matches(probe, name)]
    if config.target_modules:
        chosen = user_targets(detector, config)
        frozen = sorted(frozen_by_backbone(detector).intersection(chosen))
        stages = getattr(detector.backbone, 'frozen_stages', None)
        if frozen:
            raise ConfigError(
                f'lora.target_modules matches {frozen[0]!r}, which backbone.frozen_stages='
                f'{stages} freezes together with its adapter; set '
                'backbone.frozen_stages=-1 (the base stays frozen anyway) or leave it out.'
            )
        wanted += chosen
    kept = set(wanted)
    targets = [name for name in adaptable_modules(detector) if name in kept]
    if not targets:
        raise ConfigError(
            f'lora.exclude_modules={config.exclude_modules!r} and lora.layers_to_transform='
            f'{config.layers_to_transform!r} leave no module to adapt.'
        )
    return targets


def check_variant(config: LoraConfig, detector: nn.Module, targets: Sequence[str]) -> None:
    """Tries the adapter on one layer of each kind, so that the error can name all that refuse.

    Args:
        config: The adapter's config.
        detector: A detector that has not been injected yet.
        targets: Names of the modules that are to get it.

    Raises:
        ConfigError: For kinds of layers that can't carry this adapter, or more of it than there is
            memory for.
    """
    modules = adaptable_modules(detector)
    tell(check_size(config, {name: modules[name] for name in targets}))
    kinds: dict[type, list[str]] = {}
    for name in targets:
        kinds.setdefault(type(modules[name]), []).append(name)
    for kind, names in kinds.items():
        probe = nn.ModuleDict({'probe': copy.deepcopy(modules[names[0]])})
        only = dataclasses.replace(config, target_modules=['probe'], rank_pattern={})
        reason = None
        if config.lora_bias and issubclass(kind, nn.MultiheadAttention):
            reason = 'the bias of lora_B is not used there'
        try:
            insert(only, probe, ADAPTER)
        except Exception as error:
            reason = str(error)
        if reason:
            changed = ', '.join(
                f'{field.name}={getattr(config, field.name)!r}'
                for field in dataclasses.fields(LoraConfig)
                if field.name in _VARIANT_FIELDS
                and getattr(config, field.name) != getattr(_DEFAULTS, field.name)
            )
            shown = ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')
            raise ConfigError(
                f'lora: {changed or "this adapter"} does not work on {kind.__name__} layers '
                f'({shown}): {reason}; leave them out with lora.exclude_modules='
                f'{_exclusion(names)!r} or drop the setting.'
            )


_DEFAULTS = LoraConfig()
_VARIANT_FIELDS = {field.name for field in dataclasses.fields(LoraConfig)} - {
    'target_modules',
    'exclude_modules',
    'peft_version',
    'r',
    'lora_alpha',
    'rank_pattern',
    'alpha_pattern',
    'peft_type',
    'runtime_config',
}


def _exclusion(names: Sequence[str]) -> list[str]:
    """Name endings that exclude these modules, as short as they come."""
    return list(dict.fromkeys(re.split(r'\.\d+\.', name)[-1] for name in names))

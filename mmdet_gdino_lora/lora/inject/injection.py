"""Putting adapters on a detector, freezing the rest, and checking that what trains does train."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import MMLogger
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.inject.presets import (
    GROUPS,
    PRESETS,
    adaptable_modules,
    as_pattern,
    frozen_by_backbone,
    group_of,
    preset_targets,
    user_targets,
)
from mmdet_gdino_lora.lora.state import ADAPTER, lora_state, needs_base
from mmdet_gdino_lora.lora.tensors import LABEL_EMBEDDING, base_name, plain_tensors
from mmdet_gdino_lora.peft_layers.attention import FrozenMultiheadAttention

DEFAULT_PRESET = 'decoder'
BOX_HEAD = r'^bbox_head\.reg_branches\.'


@dataclasses.dataclass(frozen=True)
class Report:
    """What an injection made trainable.

    Attributes:
        targets: Modules with adapters.
        trained: Names of all trained parameters, adapters included, and their sizes.
        total: Number of parameters of the detector, adapters included.
    """

    targets: tuple[str, ...]
    trained: Mapping[str, int]
    total: int

    @property
    def num_trained(self) -> int:
        """Number of trained parameters."""
        return sum(self.trained.values())

    def table(self) -> str:
        """Group, modules with adapters, trained parameters and their share, as text."""
        rows = [('group', 'adapted modules', 'trained parameters', 'of all')]
        for group in [*GROUPS, None]:
            sizes = [size for name, size in self.trained.items() if group_of(name) == group]
            modules = sum(group_of(name) == group for name in self.targets)
            if sizes:
                rows.append((group or 'other', str(modules), f'{sum(sizes):,}', self._share(sizes)))
        sizes = list(self.trained.values())
        rows.append(('total', str(len(self.targets)), f'{sum(sizes):,}', self._share(sizes)))
        widths = [max(map(len, column)) for column in zip(*rows)]
        return '\n'.join(
            '  '.join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
            for row in rows
        )

    def _share(self, sizes: Sequence[int]) -> str:
        return f'{100 * sum(sizes) / self.total:.2f}%'


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
    fields = _plain(lora)
    preset = fields.pop('preset', None)
    config = _lora_config(fields)
    names = [name for name, _ in detector.named_modules()]
    parameters = [name for name, _ in detector.named_parameters()]
    targets = _resolve_targets(detector, config, preset, train_box_head)
    patterns = _freed_patterns(parameters, config, train_box_head, trainable)
    config = dataclasses.replace(
        config,
        target_modules=as_pattern(targets, names),
        exclude_modules=None,
        modules_to_save=None,
        layers_to_transform=None,
        layers_pattern=None,
    )
    config._register_custom_module({nn.MultiheadAttention: FrozenMultiheadAttention})
    modules = adaptable_modules(detector)
    _check_variant(config, {name: modules[name] for name in targets})
    state = lora_state(detector)
    if needs_base(config) and state.base is None:
        raise ConfigError(
            f'lora.init_lora_weights={config.init_lora_weights!r} with lora.use_dora='
            f'{config.use_dora} starts from the weights of the base, which load_from would bring '
            'too late: use base_checkpoint= in the model instead.'
        )
    before = {}
    if needs_base(config):
        before = {
            n: w.clone() for n, w in plain_tensors(detector).items() if n.startswith(tuple(targets))
        }
    try:
        inject_adapter_in_model(config, detector, adapter_name=ADAPTER)
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ConfigError(f'lora={fields}: PEFT refuses to inject this adapter: {error}') from error

    for name, parameter in detector.named_parameters():
        if any(re.search(pattern, base_name(name)) for pattern in patterns):
            parameter.requires_grad_(True)
    _free_label_embedding(detector)
    now = plain_tensors(detector)
    state.changed.update(n for n, weight in before.items() if not torch.equal(weight, now[n]))
    state.config, state.targets = config, tuple(targets)
    state.preset = preset if preset or fields.get('target_modules') else DEFAULT_PRESET
    report = describe(detector)
    MMLogger.get_current_instance().info('LoRA injected:\n%s', report.table())
    return report


def describe(detector: nn.Module) -> Report:
    """What is trained in an injected detector.

    Args:
        detector: The detector.

    Returns:
        The report that :func:`inject` logs.
    """
    trained = {
        base_name(name): p.numel() for name, p in detector.named_parameters() if p.requires_grad
    }
    total = sum(p.numel() for p in detector.parameters())
    return Report(lora_state(detector).targets, trained, total)


def set_frozen_eval(detector: nn.Module) -> None:
    """Puts the frozen parts into eval mode: no dropout, no stochastic depth, no moving averages.

    A module that holds parameters or buffers, none of which is trained, goes to eval mode with all
    that is inside. Parameterless modules (dropout, stochastic depth) follow the module that they
    stand in.

    Args:
        detector: A detector in training mode.
    """
    trained: dict[nn.Module, bool] = {}

    def scan(module: nn.Module) -> bool:
        trained[module] = any(p.requires_grad for p in module._parameters.values() if p is not None)
        for child in module._modules.values():
            if child is not None and scan(child):
                trained[module] = True
        return trained[module]

    def freeze(module: nn.Module) -> None:
        for child in module._modules.values():
            if child is None:
                continue
            if not trained[child] and _holds_state(child):
                child.eval()
            elif trained[child]:
                freeze(child)

    if scan(detector):
        freeze(detector)


def _holds_state(module: nn.Module) -> bool:
    return any(m._parameters or m._buffers for m in module.modules())


def _plain(value: Any) -> Any:
    """mmengine's config containers as plain dicts and lists, which PEFT can write as JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    return value


def _lora_config(fields: Mapping[str, Any]) -> LoraConfig:
    known = [field.name for field in dataclasses.fields(LoraConfig)]
    for key in fields:
        if key not in known:
            raise ConfigError(
                f'lora.{key} is neither "preset" nor a field of peft.LoraConfig, which has '
                f'{", ".join(sorted(known))}.'
            )
    if fields.get('target_modules') == 'all-linear':
        raise ConfigError("lora.target_modules='all-linear': write lora.preset='all' instead.")
    fields = {'target_modules': [], **fields}
    try:
        return LoraConfig(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f'lora={dict(fields)}: peft.LoraConfig says: {error}') from error


def _resolve_targets(
    detector: nn.Module, config: LoraConfig, preset: Any, train_box_head: bool
) -> list[str]:
    wanted: list[str] = []
    if preset or not config.target_modules:
        names = preset_targets(detector, preset or DEFAULT_PRESET, train_box_head=train_box_head)
        probe = dataclasses.replace(config, target_modules=names)
        wanted += [name for name in user_targets(detector, probe) if name in names]
    if config.target_modules:
        chosen = user_targets(detector, config)
        frozen = sorted(frozen_by_backbone(detector).intersection(chosen))
        if frozen:
            raise ConfigError(
                f'lora.target_modules matches {frozen[0]!r}, which backbone.frozen_stages='
                f'{detector.backbone.frozen_stages} freezes together with its adapter; set '
                'backbone.frozen_stages=-1 (the base stays frozen anyway) or leave it out.'
            )
        wanted += chosen
    targets = [name for name in adaptable_modules(detector) if name in set(wanted)]
    if not targets:
        raise ConfigError(
            f'lora.exclude_modules={config.exclude_modules!r} and lora.layers_to_transform='
            f'{config.layers_to_transform!r} leave no module to adapt.'
        )
    return targets


def _freed_patterns(
    parameters: Sequence[str], config: LoraConfig, train_box_head: bool, trainable: Sequence[str]
) -> list[str]:
    patterns = [BOX_HEAD] if train_box_head else []
    if isinstance(trainable, str):
        trainable = [trainable]
    saved = [rf'(^|\.){re.escape(name)}\.' for name in config.modules_to_save or ()]
    asked = dict.fromkeys(trainable, 'trainable')
    asked.update(zip(saved, [f'lora.modules_to_save={config.modules_to_save}'] * len(saved)))
    for pattern, source in asked.items():
        try:
            matches = any(re.search(pattern, name) for name in parameters)
        except re.error as error:
            raise ConfigError(
                f'{source}: {pattern!r} is no regular expression ({error}).'
            ) from None
        if not matches:
            raise ConfigError(
                f'{source}: {pattern!r} matches no parameter; names look like '
                f'{parameters[0]!r} or {parameters[-1]!r}.'
            )
    return patterns + list(asked)


def _check_variant(config: LoraConfig, targets: Mapping[str, nn.Module]) -> None:
    """Tries the adapter on one layer of each kind, so that the error can name all that refuse."""
    kinds: dict[type, list[str]] = {}
    for name, module in targets.items():
        kinds.setdefault(type(module), []).append(name)
    for kind, names in kinds.items():
        probe = nn.ModuleDict({'probe': copy.deepcopy(targets[names[0]])})
        only = dataclasses.replace(config, target_modules=['probe'], rank_pattern={})
        only._register_custom_module({nn.MultiheadAttention: FrozenMultiheadAttention})
        reason = None
        if config.lora_bias and issubclass(kind, nn.MultiheadAttention):
            reason = 'the bias of lora_B is not used there'
        try:
            inject_adapter_in_model(only, probe)
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


def _free_label_embedding(detector: nn.Module) -> None:
    """Trains the denoising queries' label embedding where the base didn't bring it.

    Its rows depend on the number of classes; random rows that stay frozen would feed noise to the
    decoder for good.
    """
    base = lora_state(detector).base
    parameter = dict(detector.named_parameters()).get(LABEL_EMBEDDING)
    if parameter is not None and (base is None or LABEL_EMBEDDING in base.absent):
        parameter.requires_grad_(True)


def adapter_layers(detector: nn.Module) -> dict[str, BaseTunerLayer]:
    """Adapted modules by name.

    Args:
        detector: An injected detector.

    Returns:
        PEFT's layers; the output projection inside an adapted attention module counts as part of
        that module and is left out.
    """
    found: dict[str, BaseTunerLayer] = {}
    for name, module in detector.named_modules():
        if isinstance(module, BaseTunerLayer) and '.base_layer.' not in name:
            found[name] = module
    return found


__all__ = ['PRESETS', 'Report', 'adapter_layers', 'describe', 'inject', 'set_frozen_eval']

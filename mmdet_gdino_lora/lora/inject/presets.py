"""Which modules get adapters: named groups of the detector's module tree, or the user's patterns.

Groups are found by prefix and module type in the detector at hand, not written down layer by layer,
so that they hold for any backbone, any number of layers and any text encoder.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Optional, Union

from peft import LoraConfig
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.peft_layers.insertion import matches
from mmdet_gdino_lora.peft_layers.layers import without_adapter

GROUPS: dict[str, tuple[str, ...]] = {
    'decoder': ('decoder.layers.',),
    'encoder': ('encoder.layers.', 'encoder.text_layers.', 'encoder.fusion_layers.'),
    'backbone': ('backbone.',),
    'text': ('language_model.',),
    'neck_and_heads': (
        'neck.',
        'text_feat_map',
        'memory_trans_fc',
        'decoder.ref_point_head.',
        'bbox_head.',
    ),
}
"""Preset name to the prefixes of the modules it covers; ``all`` stands for every group."""

PRESETS = (*GROUPS, 'all')

_PRESET_TYPES = (nn.Linear, nn.Conv2d, nn.MultiheadAttention)
_ADAPTABLE_TYPES = (*_PRESET_TYPES, nn.Embedding)


def adaptable_modules(detector: nn.Module) -> dict[str, nn.Module]:
    """Modules of the kinds that PEFT's LoRA can adapt, by name.

    The output projection inside ``nn.MultiheadAttention`` is left out: torch reads its weight and
    never calls it, so that an adapter there would never run. PEFT adapts it together with the
    attention module.

    Args:
        detector: A detector, injected or not; adapted modules keep their name.

    Returns:
        Linear, Conv2d, Embedding and MultiheadAttention modules, in the order of the module tree.
    """
    found: dict[str, nn.Module] = {}
    inside: Optional[str] = None
    for name, module in detector.named_modules():  # what is in a module comes right behind it
        if inside is not None and name.startswith(inside):
            continue
        module = without_adapter(module)
        if isinstance(module, _ADAPTABLE_TYPES):
            found[name] = module
            inside = name + '.'
    return found


def group_of(name: str) -> Optional[str]:
    """The preset group that a module or parameter belongs to.

    Args:
        name: Dotted name in the detector.

    Returns:
        A key of :data:`GROUPS`, or None for the parts that no preset covers.
    """
    for group, prefixes in GROUPS.items():
        if name.startswith(prefixes):
            return group
    return None


def parse_preset(preset: Union[str, Sequence[str]]) -> tuple[str, ...]:
    """Group names from the config's way of writing them.

    Args:
        preset: One name, several joined by ``+``, or a list of names.

    Returns:
        Names of groups, in the order of :data:`GROUPS`.

    Raises:
        ConfigError: For a name that is no preset.
    """
    names = preset.split('+') if isinstance(preset, str) else list(preset)
    names = [str(name).strip() for name in names]
    for name in names:
        if name not in PRESETS:
            near = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f' (did you mean {near[0]!r}?)' if near else ''
            raise ConfigError(
                f'lora.preset={preset!r}: {name!r} is not a preset{hint}; choose from '
                f"{', '.join(PRESETS)}, combined as 'encoder+decoder' or as a list, or name "
                'modules with lora.target_modules.'
            )
    return tuple(group for group in GROUPS if group in names or 'all' in names)


def preset_targets(
    detector: nn.Module, preset: Union[str, Sequence[str]], *, train_box_head: bool
) -> list[str]:
    """Modules that a preset covers in this detector.

    Left out are modules whose adapters could not learn: those that the forward pass doesn't reach
    (BERT's pooler, backbone stages behind the last one that is used), stages that the backbone's
    ``frozen_stages`` freezes, and box branches that are trained whole.

    Args:
        detector: A detector that has not been injected yet.
        preset: As for :func:`parse_preset`.
        train_box_head: Whether ``bbox_head.reg_branches`` is trained.

    Returns:
        Names of modules.

    Raises:
        ConfigError: For an unknown preset, or one that covers nothing here.
    """
    groups = parse_preset(preset)
    skipped = tuple(_unused_prefixes(detector))
    if train_box_head:
        skipped += ('bbox_head.reg_branches.',)
    frozen = frozen_by_backbone(detector)
    targets = [
        name
        for name, module in adaptable_modules(detector).items()
        if isinstance(module, _PRESET_TYPES)
        and group_of(name) in groups
        and not name.startswith(skipped)
        and '.pooler.' not in name
        and name not in frozen
    ]
    for group in groups:
        if not any(group_of(name) == group for name in targets) and 'all' not in preset:
            raise ConfigError(
                f'lora.preset={preset!r}: this detector has no module in group {group!r} that '
                f'could learn (backbone.frozen_stages may freeze them all); leave {group!r} out.'
            )
    return targets


def _unused_prefixes(detector: nn.Module) -> Iterable[str]:
    """Prefixes of backbone stages behind the last one whose output the neck reads."""
    backbone = getattr(detector, 'backbone', None)
    out_indices = getattr(backbone, 'out_indices', None)
    if backbone is None or not out_indices:
        return
    last = max(out_indices)
    if hasattr(backbone, 'stages'):  # Swin: a stage's downsampling belongs to the next one
        yield f'backbone.stages.{last}.downsample.'
        yield from (f'backbone.stages.{i}.' for i in range(last + 1, len(backbone.stages)))
    for name in getattr(backbone, 'res_layers', [])[last + 1 :]:  # ResNet
        yield f'backbone.{name}.'


def frozen_by_backbone(detector: nn.Module) -> set[str]:
    """Modules that the backbone's own ``frozen_stages`` freezes, again at every ``train()``.

    Args:
        detector: A detector that has not been injected yet.

    Returns:
        Names of modules.
    """
    backbone = getattr(detector, 'backbone', None)
    if backbone is None or getattr(backbone, 'frozen_stages', -1) < 0:
        return set()
    backbone.train(backbone.training)
    return {
        f'backbone.{name}'
        for name, module in backbone.named_modules()
        if any(not p.requires_grad for p in module.parameters(recurse=False))
        and isinstance(module, _ADAPTABLE_TYPES)
    }


def user_targets(detector: nn.Module, config: LoraConfig) -> list[str]:
    """Modules that ``lora.target_modules`` names, each entry checked to match something.

    Args:
        detector: A detector that has not been injected yet.
        config: With ``target_modules``: a regular expression for whole module names, or a list of
            names or name endings, as PEFT reads them. ``exclude_modules`` and
            ``layers_to_transform`` are heeded too.

    Returns:
        Names of modules.

    Raises:
        ConfigError: For an entry that matches nothing, or nothing that can carry an adapter.
    """
    adaptable = adaptable_modules(detector)
    names = [name for name, _ in detector.named_modules() if name]
    entries = config.target_modules
    targets: set[str] = set()
    for entry in [entries] if isinstance(entries, str) else sorted(entries):
        asked = entry if isinstance(entry, str) and entry is entries else [entry]
        probe = dataclasses.replace(config, target_modules=asked, exclude_modules=None)
        matched = [name for name in names if matches(probe, name)]
        usable = [name for name in matched if name in adaptable]
        if not usable:
            raise ConfigError(_no_match(entry, matched, adaptable))
        targets.update(usable)
    if config.exclude_modules:
        probe = dataclasses.replace(config, target_modules='.*', layers_to_transform=None)
        targets = {n for n in targets if matches(probe, n)}
    return [name for name in adaptable if name in targets]


def _no_match(entry: str, matched: Sequence[str], adaptable: Mapping[str, nn.Module]) -> str:
    inside = [name for name in matched if name.rpartition('.')[0] in adaptable]
    if inside:
        parents = sorted({name.rpartition('.')[0] for name in inside})
        return (
            f'lora.target_modules: {entry!r} matches the output projection inside attention '
            f'modules, whose adapter would never run; name the attention itself, such as '
            f'{parents[0]!r}, and both projections are adapted.'
        )
    if matched:
        below = [name for name in adaptable if name.startswith(matched[0] + '.')]
        hint = f'; inside {matched[0]!r} there are {", ".join(below[:4])}' if below else ''
        return (
            f'lora.target_modules: {entry!r} matches {matched[0]!r}, which is no Linear, Conv2d, '
            f'Embedding or MultiheadAttention{hint}.'
        )
    return (
        f'lora.target_modules: {entry!r} matches no module; near matches are '
        f'{", ".join(_near_matches(entry, adaptable))}.'
    )


def _near_matches(entry: str, adaptable: Mapping[str, nn.Module], count: int = 4) -> list[str]:
    """Adaptable names that resemble ``entry`` most, one for each kind of layer."""
    kinds: dict[str, str] = {}
    for name in adaptable:
        kinds.setdefault(re.sub(r'\d+', '0', name), name)
    wanted = re.sub(r'\d+', '0', re.sub(r'[^\w.]', '', entry)).strip('.')

    def likeness(kind: str) -> float:
        tail = '.'.join(kind.split('.')[-1 - wanted.count('.') :])
        return difflib.SequenceMatcher(None, wanted, tail).ratio()

    return [kinds[kind] for kind in sorted(kinds, key=likeness, reverse=True)[:count]]


def as_pattern(targets: Sequence[str], names: Iterable[str]) -> str:
    """A regular expression that matches exactly the targets among all module names.

    PEFT's lists match name endings, which can reach into other parts of the model; an expression
    for whole names can't. Layer numbers are written ``\\d+`` where every layer is meant.

    Args:
        targets: Names of modules.
        names: Names of all modules of the detector.

    Returns:
        An expression for ``re.fullmatch``, the form PEFT takes for ``target_modules``.
    """
    wanted = set(targets)
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r'\d+', '#', name), []).append(name)
    parts: list[str] = []
    for name in targets:
        same_kind = kinds[re.sub(r'\d+', '#', name)]
        pieces = re.split(r'(\d+)', name)
        escaped = [re.escape(piece) for piece in pieces]
        for i in range(1, len(pieces), 2):
            wider = [*escaped[:i], r'\d+', *escaped[i + 1 :]]
            expression = re.compile(''.join(wider))
            if all(other in wanted for other in same_kind if expression.fullmatch(other)):
                escaped = wider
        parts.append(''.join(escaped))
    return '|'.join(dict.fromkeys(parts))

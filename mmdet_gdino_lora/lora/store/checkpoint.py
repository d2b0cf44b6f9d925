"""What a detector's state dict holds, and how state dicts of three kinds are loaded into it.

A detector that knows where its base came from saves what differs from it: adapters, parameters
that are trained beside them, and their buffers. The record that ties the two together travels in
the state dict's metadata, where torch keeps module versions. On the way in, a state dict is

* an *adapter*: the base is loaded where it is not there yet, and its fingerprint compared;
* a *full* one, written with ``full_checkpoint=True`` or on a random base;
* a *plain* one with mmdet's names: a base, that mmengine's ``load_from`` brings.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from functools import partial
from typing import Any

from mmengine.logging import MMLogger
from torch import Tensor, nn

from mmdet_gdino_lora.engine.runner_config import checkpoint_at_start, runner_config
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.loaders import SOURCE
from mmdet_gdino_lora.lora.state import Base, LoraState, lora_state
from mmdet_gdino_lora.lora.store.base import (
    base_location,
    base_of,
    base_weights,
    fit_base,
    in_mmdet_names,
)
from mmdet_gdino_lora.lora.tensors import (
    ADAPTER,
    LABEL_EMBEDDING,
    base_name,
    is_factor,
    named_tensors,
)
from mmdet_gdino_lora.peft_layers.insertion import reads_base
from mmdet_gdino_lora.peft_layers.out_proj import in_todays_count, peft_out_proj_factor

RECORD = 'mmdet_gdino_lora'
"""Key of the record in a state dict's metadata, and in a safetensors file's."""

_BASE_FIELDS = dict(source=str, path=str, fingerprint=dict, absent=list)
_MEANING = ('r', 'lora_alpha', 'use_rslora', 'use_dora', 'rank_pattern', 'alpha_pattern')


def install_hooks(detector: nn.Module, *, full_checkpoint: bool = False) -> None:
    """Makes the detector save and load as described above, through torch's and mmengine's ways.

    Args:
        detector: Injected, or plain: that one tells adapter checkpoints apart and refuses them.
        full_checkpoint: Whether checkpoints hold the base as well.
    """
    lora_state(detector).keeps_base_in_checkpoints(full_checkpoint)
    detector.register_state_dict_post_hook(_keep_what_differs)
    detector.register_load_state_dict_pre_hook(_load)


# ---------------------------------------------------------------------------------------- saving


def record(detector: nn.Module) -> dict[str, Any]:
    """Takes down what has to be known to use a checkpoint: adapter config, base, factors.

    Args:
        detector: An injected detector.

    Returns:
        Plain values only, as JSON takes them.
    """
    state = lora_state(detector)
    base, taught = state.base, state.taught(ADAPTER)
    return dict(
        format=1,
        adapter=json.loads(json.dumps(state.adapter_config.to_dict(), default=_listed)),
        preset=state.preset,
        changed=sorted(state.changed),
        taught=None if taught is None else sorted(taught),
        attention_output_factor=peft_out_proj_factor(),
        base=base
        and dict(
            source=base.source,
            path=base.path,
            fingerprint=dict(base.fingerprint),
            absent=sorted(base.absent),
        ),
    )


def checked_note(note: Any, what: str) -> dict[str, Any]:
    """Takes a record out of a file, where it may have been damaged or spliced.

    Args:
        note: As found; None where there is none.
        what: The file, for the message.

    Returns:
        The record; empty where there is none.

    Raises:
        ConfigError: If it is no record as :func:`record` makes it.
    """
    if note is None:
        return {}
    fits = isinstance(note, dict) and all(
        isinstance(note.get(key), (kind, type(None)))
        for key, kind in (('adapter', dict), ('changed', list), ('base', dict), ('taught', list))
    )
    fits = fits and isinstance(note.get('attention_output_factor'), (int, float, type(None)))
    fits = fits and all(isinstance(name, str) for name in note.get('taught') or ())
    base = (note.get('base') if fits else None) or {}
    fits = fits and (not base or base.keys() == _BASE_FIELDS.keys())
    if not fits or not all(isinstance(base[k], _BASE_FIELDS[k]) for k in base):
        raise ConfigError(
            f'{what}: the record of its adapter ({RECORD}) is damaged or of another version; use '
            'another copy.'
        )
    return note


def _listed(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def _keep_what_differs(
    detector: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict
) -> None:
    state = lora_state(detector)
    if state.config is None:
        return
    local_metadata[RECORD] = record(detector)
    for name in state_dict if state.switch.set_aside else ():
        plain = base_name(name.removeprefix(prefix))
        state_dict[name] = state.switch.set_aside.get(plain, state_dict[name])
    if state.full_checkpoint or not _base_is_elsewhere(state):
        return
    kept = {prefix + name for name in state.names_to_save(detector)}
    for name in [n for n in state_dict if n.startswith(prefix) and n not in kept]:
        del state_dict[name]


def _base_is_elsewhere(state: LoraState) -> bool:
    """Tells whether the base can be read again, so that it need not be saved."""
    if state.awaits_weights:
        # mmengine's AveragedModel asks for the names that it will average before load_from has
        # brought the base, and they have to be those that the detector saves afterwards.
        return bool(checkpoint_at_start())
    return state.base is not None and bool(state.base.source)


# --------------------------------------------------------------------------------------- loading


def _load(
    detector: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: Mapping[str, Any],
    *_: Any,
) -> None:
    """Puts the state dict into the detector's own shape: every tensor once, under its own name."""
    state = lora_state(detector)
    incoming = {n[len(prefix) :]: v for n, v in state_dict.items() if n.startswith(prefix)}
    if not incoming:
        return
    for name, value in incoming.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f'the checkpoint holds a {type(value).__name__} under {name}, where weights belong '
                'and is damaged; use another copy.'
            )
    note = checked_note(local_metadata.get(RECORD), 'the checkpoint')
    if state.config is None:
        if any('.lora_' in name for name in incoming):
            raise ConfigError(
                'the checkpoint holds LoRA adapters, but the config sets no model.lora; use the '
                'config that it was trained with, or merge it with tools/merge_adapter.py.'
            )
        return
    if state.switch.active != ADAPTER:  # whose weights these are
        state.switch.to(detector, ADAPTER, partial(base_of, detector))
    if any('.lora_' in name for name in incoming):
        incoming = _from_adapter(detector, incoming, note)
    else:
        incoming = _from_plain(detector, incoming, local_metadata.get(SOURCE))
    for name in [n for n in state_dict if n.startswith(prefix)]:
        del state_dict[name]
    # What didn't come stays as it is; handed to torch as well, so that it isn't reported missing.
    for name, tensor in named_tensors(detector).items():
        state_dict[prefix + name] = incoming.get(name, tensor)


def _from_plain(detector: nn.Module, incoming: dict[str, Tensor], file: Any) -> dict[str, Tensor]:
    state = lora_state(detector)
    config = state.adapter_config
    if reads_base(config):
        raise ConfigError(
            'load_from brings the base after adapters were initialised from other weights '
            f'(lora.init_lora_weights={config.init_lora_weights!r}, lora.use_dora='
            f'{config.use_dora}): use base_checkpoint= in the model instead.'
        )
    # mmengine's FlexibleRunner loads before it says what its config is.
    source = str(runner_config().get('load_from') or file or '')
    state.stands_on(fit_base(detector, in_mmdet_names(detector, incoming), source))
    return {}


def _from_adapter(
    detector: nn.Module, incoming: dict[str, Tensor], note: Mapping[str, Any]
) -> dict[str, Tensor]:
    state = lora_state(detector)
    _check_adapter(detector, incoming, note)
    names = {base_name(name): name for name in named_tensors(detector)}
    unknown = [name for name in incoming if base_name(name) not in names]
    if unknown:
        raise ConfigError(
            f'the checkpoint holds {unknown[0]!r}, which this model has not; use the config that '
            'it was trained with.'
        )
    found = {names[base_name(name)]: value for name, value in incoming.items()}
    plain = {base_name(name) for name in incoming} | {LABEL_EMBEDDING}
    absent = [name for name in note.get('changed') or () if name in names and name not in plain]
    if absent:
        raise ConfigError(
            f'the checkpoint lacks {absent[0]!r} ({len(absent)} of what was trained): it is '
            'damaged; use another copy.'
        )
    state.knows(ADAPTER, note.get('taught'))
    base = note.get('base')
    if all(name in found for name, _ in detector.named_parameters()):  # the base came along
        state.stands_on(Base(**_base_fields(base)) if base else None)
        state.brought(note.get('changed') or ())
    else:
        if base:
            check_base(detector, base)
        else:
            _take_base_on_trust(state)
        state.brought(base_name(name) for name in found)
    return in_todays_count(found, note.get('attention_output_factor'))


def _check_adapter(
    detector: nn.Module, incoming: dict[str, Tensor], note: Mapping[str, Any]
) -> None:
    state = lora_state(detector)
    theirs, ours = note.get('adapter') or {}, record(detector)['adapter']
    for key in _MEANING:
        if key in theirs and theirs[key] != ours[key]:
            raise ConfigError(
                f'the adapter in the checkpoint was trained with {key}={theirs[key]!r}, the config '
                f'says lora.{key}={ours[key]!r}; set lora.{key}={theirs[key]!r}.'
            )
    parameters = dict(detector.named_parameters())
    for name, value in list(incoming.items()):
        if name in parameters and parameters[name].shape != value.shape:
            if name == LABEL_EMBEDDING:  # of other classes: the model's own stays
                del incoming[name]
                continue
            raise ConfigError(
                f'the adapter in the checkpoint does not fit: {name} is {tuple(value.shape)} there '
                f'and {tuple(parameters[name].shape)} in the model '
                f'(lora.r={state.adapter_config.r}); use the config that it was trained with.'
            )
    theirs = {name for name in incoming if '.lora_' in name}
    ours = {name for name in parameters if is_factor(name, ADAPTER)}
    if theirs != ours:
        name = sorted(theirs ^ ours)[0]
        module = name.split('.lora_')[0]
        raise ConfigError(
            f'the checkpoint adapts other modules than lora.preset={state.preset!r} does '
            f'({module} only {"in the checkpoint" if name in theirs else "in the model"}); it was '
            f'trained with preset={note.get("preset")!r}.'
        )


def _take_base_on_trust(state: LoraState) -> None:
    """Puts an adapter whose record was lost, as in a dict of plain tensors, on what is there."""
    if state.base is None:
        raise ConfigError(
            'the checkpoint holds an adapter without a record of the base that it was trained on, '
            'and the base of this detector is random: set model.base_checkpoint to that base.'
        )
    MMLogger.get_current_instance().warning(
        'The checkpoint holds an adapter without a record of the base that it was trained on; it '
        'is put on %s, and whether that is the same could not be checked.',
        state.base,
    )


def _base_fields(base: Mapping[str, Any]) -> dict[str, Any]:
    return {**base, 'absent': frozenset(base['absent'])}


def check_base(detector: nn.Module, base: Mapping[str, Any]) -> None:
    """Loads the base that an adapter was trained on where none is there, and compares it.

    Args:
        detector: An injected detector.
        base: The record's ``base``.

    Raises:
        ConfigError: If the base isn't found, or the detector stands on another one.
    """
    state = lora_state(detector)
    wanted, here = Base(**_base_fields(base)), state.base
    if here is None:
        if reads_base(state.adapter_config):
            raise ConfigError(
                f'the adapter was initialised from its base {wanted}: set '
                f'model.base_checkpoint={wanted.source!r}.'
            )
        found = base_location(wanted)
        try:
            weights = base_weights(detector, found)
        except ConfigError as error:
            raise ConfigError(
                f'the adapter needs its base {wanted}, which is not at {wanted.source!r} any more; '
                f'set model.base_checkpoint to where it lies now ({error})'
            ) from error
        here = fit_base(detector, weights, found)
        here = dataclasses.replace(here, source=wanted.source)
        state.stands_on(here)
        MMLogger.get_current_instance().info('Base of the adapter loaded from %s', found)
    theirs, ours = wanted.fingerprint, here.fingerprint
    differing = sorted(g for g in {*theirs, *ours} if theirs.get(g) != ours.get(g))
    if wanted.absent != here.absent:  # other classes
        differing = [group for group in differing if group != LABEL_EMBEDDING.split('.')[0]]
    if differing:
        raise ConfigError(
            f'the adapter was trained on the base {wanted} and the model stands on {here}, '
            f'whose {", ".join(differing)} differ; set base_checkpoint to the former.'
        )

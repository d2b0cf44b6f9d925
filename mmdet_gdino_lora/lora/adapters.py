"""Several adapters on one base: load, switch, combine, switch off. The base is read once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Optional, Union

import torch
from mmengine.logging import MMLogger
from peft import LoraConfig
from torch import Tensor, nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.read import read_file, read_json
from mmdet_gdino_lora.lora.state import LoraState, lora_state
from mmdet_gdino_lora.lora.store.base import base_of
from mmdet_gdino_lora.lora.store.checkpoint import RECORD, check_base, checked_note
from mmdet_gdino_lora.lora.store.folder import read_folder, without_adapter_name
from mmdet_gdino_lora.lora.tensors import ADAPTER, base_name, is_factor
from mmdet_gdino_lora.peft_layers.insertion import insert, take_out
from mmdet_gdino_lora.peft_layers.out_proj import in_todays_count


@torch.no_grad()
def load_adapter(detector: nn.Module, source: str, name: str) -> None:
    """Puts another adapter beside those that the detector has, switched off.

    Args:
        detector: An injected detector.
        source: A folder in PEFT's format (see :func:`~.files.export_adapter`) or a training
            checkpoint. It may have another rank and other targets.
        name: To call it by.

    Raises:
        ConfigError: If the name is taken, the files are damaged, or the adapter was trained on
            another base.
    """
    state = _injected(detector)
    if name in state.switch.adapters:
        raise ConfigError(f'adapter {name!r} is there already; choose another name.')
    if not name or '.' in name:
        raise ConfigError(f'adapter {name!r}: a name needs a letter and must not have a dot.')
    weights, note = _read(source)
    _check_base(detector, note, source)
    weights = in_todays_count(weights, note.get('attention_output_factor'))
    try:
        factors = _put_in(detector, _config(note, source, weights), name)
        _fill(factors, {n: w for n, w in weights.items() if is_factor(n)}, source)
        state.switch.add(name, {n: w for n, w in weights.items() if not is_factor(n)})
        state.knows(name, note.get('taught'))
        set_adapter(detector, state.switch.active)
    except Exception:
        take_out(detector, name)
        state.switch.remove(name)
        set_adapter(detector, state.switch.active)
        raise


def _put_in(detector: nn.Module, config: LoraConfig, name: str) -> dict[str, Tensor]:
    """Puts an adapter in, frozen; returns its weights by the names that they have in files."""
    requires_grad = {base_name(n): p.requires_grad for n, p in detector.named_parameters()}
    try:
        insert(config, detector, name)
    except Exception as error:  # PEFT's own, of many kinds
        reason = ' '.join(str(error).split())
        raise ConfigError(
            f'adapter {name!r} does not go onto this detector ({reason}); use its own config.'
        ) from error
    lora_state(detector).switch.adapters_changed()
    added: dict[str, Tensor] = {}
    for parameter_name, parameter in detector.named_parameters():
        parameter.requires_grad_(requires_grad.get(base_name(parameter_name), False))
        if base_name(parameter_name) not in requires_grad:
            added[without_adapter_name(parameter_name, name)] = parameter
    return added


def _fill(slots: Mapping[str, Tensor], factors: Mapping[str, Tensor], source: str) -> None:
    for key in sorted(slots.keys() | factors.keys()):
        misfit = key not in slots or key not in factors
        if misfit or slots[key].shape != factors[key].shape:
            raise ConfigError(f'{source}: {key} does not fit this detector; use its own config.')
        slots[key].data = slots[key].data.float()  # whatever the base is
        slots[key].copy_(factors[key])


def set_adapter(
    detector: nn.Module, adapter: Union[str, Mapping[str, float], None] = ADAPTER
) -> None:
    """Switches to an adapter, to a combination, or to the base.

    Args:
        detector: An injected detector.
        adapter: A name; or weights by name: changes to the base are added up with these weights;
            or None, for the base alone. The detector's own adapter is called ``'default'``.

    Raises:
        ConfigError: For a name that isn't loaded.
    """
    state = _injected(detector)
    adapter = {} if adapter is None else adapter
    for name in [adapter] if isinstance(adapter, str) else adapter:
        if name not in state.switch.adapters:
            there = sorted(state.switch.adapters)
            raise ConfigError(f'adapter {name!r} is not loaded; there are {there}.')
    state.switch.to(detector, adapter, partial(base_of, detector))


@contextmanager
def base_only(detector: nn.Module) -> Iterator[None]:
    """Within, the detector is its base: adapters off, everything else at the base's values.

    Args:
        detector: An injected detector.

    Yields:
        Nothing.
    """
    with _injected(detector).switch.off(detector, partial(base_of, detector)):
        yield


def _check_base(detector: nn.Module, note: Mapping[str, Any], source: str) -> None:
    """Sees to it that the adapter meets the base that it was trained on, if that is known."""
    if note.get('base'):
        check_base(detector, note['base'])
    elif lora_state(detector).base is None:
        raise ConfigError(
            f'{source} has no record of the base that the adapter was trained on, and this '
            'detector stands on random weights; set model.base_checkpoint to that base.'
        )
    else:
        MMLogger.get_current_instance().warning(
            '%s has no record of the base that the adapter was trained on; whether it was %s is '
            'not known.',
            source,
            lora_state(detector).base,
        )


def _injected(detector: nn.Module) -> LoraState:
    """The state, with what the trained adapter changes without factors taken down."""
    state = lora_state(detector)
    if state.config is None:
        raise ConfigError('this detector has no adapters; set model.lora.')
    state.switch.remember(detector, state.changed)
    return state


def _read(source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by plain name without adapter names, and the record that came with them."""
    if os.path.isdir(source):
        return read_folder(source)
    content = read_file(source)
    state_dict = content.get('state_dict', content)
    if not isinstance(state_dict, Mapping):
        raise ConfigError(f'{source} holds no weights; give a folder or checkpoint of an adapter.')
    note = checked_note(_metadata_of(state_dict).get(RECORD), source)
    found = {name: w for name, w in state_dict.items() if isinstance(w, Tensor)}
    weights = {without_adapter_name(name, ADAPTER): w for name, w in found.items()}
    weights = {n if is_factor(n) else base_name(n): w for n, w in weights.items()}
    return weights, note


def _metadata_of(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """What torch keeps of the whole module beside a state dict."""
    metadata = getattr(state_dict, '_metadata', None)
    own = metadata.get('') if isinstance(metadata, Mapping) else None
    return own if isinstance(own, Mapping) else {}


def _config(note: Mapping[str, Any], source: str, weights: Mapping[str, Tensor]) -> LoraConfig:
    fields: Optional[dict] = note.get('adapter')
    if fields is None:
        path = os.path.join(source, 'adapter_config.json')
        if not os.path.isfile(path):
            raise ConfigError(f'{source} is no adapter: it says nothing of its targets and rank.')
        fields = read_json(path)
    # PEFT imports a module by the name that megatron_core gives.
    known = LoraConfig.__dataclass_fields__.keys() - {'megatron_config', 'megatron_core'}
    fields = {k: v for k, v in fields.items() if k in known}
    if isinstance(fields.get('init_lora_weights'), str):
        raise ConfigError(
            f'{source}: an adapter that rewrote its base (init_lora_weights='
            f'{fields["init_lora_weights"]!r}) cannot stand beside others; merge it.'
        )
    _check_ranks(fields, source, weights)
    fields.update(modules_to_save=None, inference_mode=False, auto_mapping=None)
    try:
        return LoraConfig(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f'{source}: peft.LoraConfig says: {error}; use another copy.') from error


def _check_ranks(fields: Mapping[str, Any], source: str, weights: Mapping[str, Tensor]) -> None:
    """A rank beyond every weight's size would be given memory before the misfit is noticed."""
    largest = max((size for w in weights.values() for size in w.shape), default=0)
    pattern = fields.get('rank_pattern') or {}
    ranks = [fields.get('r', 1), *(pattern.values() if isinstance(pattern, dict) else [pattern])]
    for rank in ranks:
        if not isinstance(rank, int) or not 0 < rank <= largest:
            raise ConfigError(
                f'{source}: its config says rank {rank!r}, and no weight of its file has more '
                f'than {largest} rows or columns; use another copy.'
            )

"""Several adapters on one base: load, switch, combine, switch off. The base is read once."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional, Union

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor, nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora.state import ADAPTER, lora_state
from mmdet_gdino_lora.lora.store.base import base_weights, read_file, read_weights
from mmdet_gdino_lora.lora.store.checkpoint import RECORD, check_base
from mmdet_gdino_lora.lora.store.folder import PEFT_PREFIX
from mmdet_gdino_lora.lora.tensors import LABEL_EMBEDDING, base_name, plain_tensors
from mmdet_gdino_lora.peft_layers.attention import FrozenMultiheadAttention


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
    state = lora_state(detector)
    _remember_own(detector)
    if name in state.freed:
        raise ConfigError(f'adapter {name!r} is there already; choose another name.')
    if not name or '.' in name:
        raise ConfigError(f'adapter {name!r}: a name needs a letter and must not have a dot.')
    weights, note = _read(source)
    if note.get('base'):
        check_base(detector, note['base'])
    trained = {base_name(n): p.requires_grad for n, p in detector.named_parameters()}
    config = _config(note, source)
    config._register_custom_module({nn.MultiheadAttention: FrozenMultiheadAttention})
    inject_adapter_in_model(config, detector, adapter_name=name)
    parameters = dict(detector.named_parameters())
    added = {n for n in parameters if base_name(n) not in trained}
    for parameter_name, parameter in parameters.items():
        parameter.requires_grad_(trained.get(base_name(parameter_name), False))
    own = {_without_adapter(n, name): n for n in added}
    factors = {key: tensor for key, tensor in weights.items() if '.lora_' in key}
    freed = {key: tensor for key, tensor in weights.items() if key not in factors}
    for key in sorted(own.keys() | factors.keys()):
        misfit = key not in own or key not in factors
        if misfit or parameters[own[key]].shape != factors[key].shape:
            _take_out(detector, name)
            set_adapter(detector, state.active)
            raise ConfigError(f'{source}: {key} does not fit this detector; use its own config.')
        parameters[own[key]].data = parameters[own[key]].data.float()  # whatever the base is
        parameters[own[key]].copy_(factors[key])
    freed.pop(LABEL_EMBEDDING, None)
    state.freed[name] = freed
    set_adapter(detector, state.active)


def _take_out(detector: nn.Module, name: str) -> None:
    for module in detector.modules():
        if isinstance(module, BaseTunerLayer) and name in module.scaling:
            module.delete_adapter(name)


@torch.no_grad()
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
    state = lora_state(detector)
    _remember_own(detector)
    if adapter is None:
        adapter = {}
    weights = {adapter: 1.0} if isinstance(adapter, str) else dict(adapter)
    for name in weights:
        if name not in state.freed:
            raise ConfigError(f'adapter {name!r} is not loaded; there are {sorted(state.freed)}.')
    trained = [(p, p.requires_grad) for p in detector.parameters()]
    for module_name, module in detector.named_modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter([name for name in weights if name in module.scaling])
            module.enable_adapters(bool(weights))
            for name, weight in weights.items():
                if name in module.scaling:
                    # Not PEFT's set_scale, which forgets rsLoRA's root up to 0.15.
                    key = (module_name, name)
                    whole = state.scalings.setdefault(key, module.scaling[name])
                    module.scaling[name] = whole * weight
    for parameter, requires_grad in trained:
        parameter.requires_grad_(requires_grad)
    own = plain_tensors(detector)
    for key in {key for freed in state.freed.values() for key in freed}:
        changed = [(w, state.freed[n][key]) for n, w in weights.items() if key in state.freed[n]]
        if len(changed) == 1 and changed[0][0] == 1:
            own[key].copy_(changed[0][1])
            continue
        base = _base_value(detector, key).to(own[key].device)
        deltas = (w * (tensor.to(own[key].device) - base) for w, tensor in changed)
        own[key].copy_(sum(deltas, start=base))
    state.active = adapter if isinstance(adapter, str) else weights
    # Autocast remembers casts of weights, and doesn't notice that they have changed since.
    torch.clear_autocast_cache()


@contextmanager
def base_only(detector: nn.Module) -> Iterator[None]:
    """Within, the detector is its base: adapters off, freed parameters at the base's values.

    Args:
        detector: An injected detector.

    Yields:
        Nothing.
    """
    active = lora_state(detector).active
    set_adapter(detector, None)
    try:
        yield
    finally:
        set_adapter(detector, active)


def _remember_own(detector: nn.Module) -> None:
    """Keeps what belongs to the detector's own adapter beside the low-rank factors."""
    state = lora_state(detector)
    if state.config is None:
        raise ConfigError('this detector has no adapters; set model.lora.')
    if state.active != ADAPTER:
        return
    names = {base_name(n) for n, p in detector.named_parameters() if p.requires_grad}
    names = {n for n in names | state.changed if '.lora_' not in n and n != LABEL_EMBEDDING}
    own = plain_tensors(detector)
    state.freed[ADAPTER] = {name: own[name].clone() for name in names}


def _base_value(detector: nn.Module, name: str) -> Tensor:
    state = lora_state(detector)
    if name not in state.base_values:
        if state.base is None or not state.base.source:
            raise ConfigError(
                'the base is random or of unknown origin, so there is nothing to switch to; set '
                'model.base_checkpoint.'
            )
        weights = base_weights(detector, state.base.source)
        own = plain_tensors(detector)
        wanted = {key for freed in state.freed.values() for key in freed}
        state.base_values = {key: weights[key].to(own[key]) for key in wanted}
    return state.base_values[name]


def _read(source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights by plain name without adapter names, and the record that came with them."""
    path = os.path.join(source, 'adapter_model.safetensors')
    if os.path.isdir(source):
        weights = {name.removeprefix(PEFT_PREFIX): w for name, w in read_weights(path).items()}
        with safe_open(path, 'pt') as file:
            note = json.loads((file.metadata() or {}).get(RECORD, '{}'))
        return weights, note
    content = read_file(source)
    state_dict = content.get('state_dict', content)
    metadata = getattr(state_dict, '_metadata', {}).get('', {})
    weights = {_without_adapter(name, ADAPTER): w for name, w in state_dict.items()}
    weights = {n if '.lora_' in n else base_name(n): w for n, w in weights.items()}
    return weights, metadata.get(RECORD, {})


def _without_adapter(name: str, adapter: str) -> str:
    if '.lora_' not in name:
        return name
    return name.replace(f'.{adapter}.', '.').removesuffix(f'.{adapter}')


def _config(note: Mapping[str, Any], source: str) -> LoraConfig:
    fields: Optional[dict] = note.get('adapter')
    if fields is None:
        path = os.path.join(source, 'adapter_config.json')
        if not os.path.isfile(path):
            raise ConfigError(f'{source} is no adapter: it says nothing of its targets and rank.')
        with open(path, encoding='utf-8') as file:
            fields = json.load(file)
    fields = {k: v for k, v in fields.items() if k in LoraConfig.__dataclass_fields__}
    if isinstance(fields.get('init_lora_weights'), str):
        raise ConfigError(
            f'{source}: an adapter that rewrote its base (init_lora_weights='
            f'{fields["init_lora_weights"]!r}) cannot stand beside others; merge it.'
        )
    fields.update(modules_to_save=None, inference_mode=False)
    return LoraConfig(**fields)

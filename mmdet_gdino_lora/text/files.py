"""Where text models are found, and one clear sentence where they are not, or can't be read."""

from __future__ import annotations

import json
import os
import pickle
from typing import Any, Callable, Optional, TypeVar

from huggingface_hub import constants, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.files.read import shards_of
from mmdet_gdino_lora.text.hub import hub_is_out_of_reach, is_network_error

_T = TypeVar('_T')

#: Files that a tokenizer's words are in; a folder needs one of them.
_VOCABULARIES = ('vocab.txt', 'tokenizer.json')

#: What files in a folder that are damaged, or of another model, end in.
_UNREADABLE = (ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError)


def text_model(name: str, load: Callable[..., _T], **kwargs: Any) -> _T:
    """Loads a part of a text model: its config, its tokenizer or its weights.

    Args:
        name: Folder, or name on the Hugging Face hub.
        load: A ``from_pretrained`` of transformers.
        **kwargs: Passed on.

    Returns:
        What ``load`` returns.

    Raises:
        ConfigError: It isn't there, its files can't be read, or a package is missing. Whatever else
            goes wrong in ``load`` is no mistake of the config and is raised as it is.
    """
    what = f'text model {name!r} (language_model.name)'
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        _check_config_file(what, folder)
        name = folder
    elif looks_like_path(name):
        raise ConfigError(
            f'{what}: no text model there, the folder does not exist; give a folder with '
            'config.json and vocab.txt or tokenizer.json'
        )
    elif hub_is_out_of_reach():
        kwargs = dict(kwargs, local_files_only=True)
    try:
        return load(name, **kwargs)
    except Exception as error:
        told = _told(error, os.path.isdir(name))
        if told is None:
            raise
        raise ConfigError(f'{what}{told}') from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads the fast tokenizer of a text model.

    Args:
        name: Folder, or name on the Hugging Face hub.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: As :func:`text_model`; or a folder has no vocabulary, in which transformers
            would take every word for an unknown one.
    """
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        # Asked first: transformers 4 stops at a vocabulary that isn't there, in its own ways.
        what = f'text model {name!r} (language_model.name)'
        _check_config_file(what, folder)
        _check_vocabulary(what, folder)
    return text_model(name, AutoTokenizer.from_pretrained, use_fast=True, trust_remote_code=False)


def is_at_hand(name: str) -> bool:
    """Tells whether a tokenizer can be loaded without the network.

    Args:
        name: Folder, or name on the Hugging Face hub.

    Returns:
        True for whatever can only be a folder, be it there or not, and for names on the hub whose
        vocabulary lies in the cache.
    """
    if looks_like_path(name) or os.path.isdir(os.path.expanduser(name)):
        return True
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in _VOCABULARIES)


def is_out_of_reach(name: str) -> bool:
    """Tells whether a text model is neither here nor to be had from the hub, after one try.

    Args:
        name: Folder, or name on the Hugging Face hub.
    """
    return not is_at_hand(name) and (constants.HF_HUB_OFFLINE or hub_is_out_of_reach())


def looks_like_path(name: str) -> bool:
    """Tells whether a text model's name can only be meant as a folder.

    Args:
        name: ``'bert-base-uncased'`` and ``'owner/model'`` may be on the hub.

    Returns:
        True for absolute paths, ``./``, ``../``, ``~`` and anything with more than one slash.
    """
    return name.startswith(('/', '.', '~')) or name.count('/') > 1 or '\\' in name


def _check_config_file(what: str, folder: str) -> None:
    path = os.path.join(folder, 'config.json')
    if not os.path.isfile(path):
        raise ConfigError(
            f'{what}: no text model there; give a folder with config.json and vocab.txt or '
            'tokenizer.json'
        )
    try:
        with open(path, encoding='utf-8') as file:
            json.load(file)
    except ValueError as error:
        raise ConfigError(
            f'{what} can not be read, its config.json is no JSON: {_first_line(error)}; download '
            'it again'
        ) from error
    if os.path.isfile(os.path.join(folder, 'adapter_config.json')):
        # transformers would read the model that this names instead, wherever that is.
        raise ConfigError(
            f'{what}: its adapter_config.json names another model, and the folder is to hold the '
            'text model itself; remove that file, or give the folder of the model'
        )
    for index in ('model.safetensors.index.json', 'pytorch_model.bin.index.json'):
        if os.path.isfile(os.path.join(folder, index)):
            shards_of(os.path.join(folder, index))


def _check_vocabulary(what: str, folder: str) -> None:
    if not any(os.path.isfile(os.path.join(folder, file)) for file in _VOCABULARIES):
        raise ConfigError(
            f'{what} has neither vocab.txt nor tokenizer.json, so that every word would be read as '
            "[UNK]; put the vocab.txt of the base's text model beside its config.json"
        )


def _told(error: Exception, in_folder: bool) -> Optional[str]:
    """Says what went wrong and what helps; None for an error that no config can mend."""
    reason = _first_line(error)
    if isinstance(error, ImportError):
        return f' needs a package that is missing: {reason}; install it'
    if 'custom code' in reason:
        return (
            ' comes with code of its own (auto_map in its config files), which is never run; give '
            'a BERT that transformers knows'
        )
    # of a name that isn't one on the hub, huggingface_hub says so with a ValueError
    not_there = OSError if in_folder else (OSError, ValueError)
    # transformers 4 says so with an OSError, whatever kept it from reading the file
    damaged = reason.startswith('Unable to load weights')
    if not damaged and (isinstance(error, not_there) or is_network_error(error)):
        where = '' if in_folder else ' (no folder of that name, nor on the hub)'
        return (
            f': no text model there{where}: {reason}; give a folder with config.json, vocab.txt '
            'and model.safetensors, or connect to the Hugging Face hub, or set HF_HOME to a cache '
            'that holds it'
        )
    if damaged or isinstance(error, _UNREADABLE):
        return (
            f' can not be read: {type(error).__name__}: {reason}; its files are damaged or of '
            'another model, download it again or give another one'
        )
    return None


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).strip().splitlines()]
    # torch's own begins with a heading: 'Error(s) in loading state_dict for Embedding:'
    said = ' '.join(lines[:2]) if lines and lines[0].endswith(':') else ''.join(lines[:1])
    return said.rstrip('.') or type(error).__name__

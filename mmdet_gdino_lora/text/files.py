"""Where text models are found, and one clear sentence where they are not."""

from __future__ import annotations

import os
from typing import Any, Callable, TypeVar

from mmdet_gdino_lora.errors import ConfigError

_T = TypeVar('_T')


def text_model(name: str, load: Callable[..., _T], **kwargs: Any) -> _T:
    """Loads a part of a text model: its config, its tokenizer or its weights.

    Args:
        name: Folder, or name on the Hugging Face hub.
        load: A ``from_pretrained`` of transformers.
        **kwargs: Passed on.

    Returns:
        What ``load`` returns.

    Raises:
        ConfigError: It isn't there.
    """
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        if not os.path.isfile(os.path.join(folder, 'config.json')):
            raise ConfigError(
                f'text model {name!r} (language_model.name): no text model there; give a folder '
                'with config.json and vocab.txt or tokenizer.json'
            )
        name = folder
    elif looks_like_path(name):
        raise ConfigError(
            f'text model {name!r} (language_model.name): no text model there, the folder does not '
            'exist; give a folder with config.json and vocab.txt or tokenizer.json'
        )
    try:
        return load(name, **kwargs)
    # transformers and huggingface_hub raise OSError and ValueError, httpx and requests their own
    except Exception as error:
        raise ConfigError(
            f'text model {name!r} (language_model.name): no text model there'
            f'{"" if os.path.isdir(name) else " (no folder of that name, nor on the hub)"}: '
            f'{_first_line(error)}; give a folder with config.json, vocab.txt and '
            'model.safetensors, or connect to the Hugging Face hub, or set HF_HOME to a cache '
            'that holds it'
        ) from error


def looks_like_path(name: str) -> bool:
    """Whether a text model's name can only be meant as a folder.

    Args:
        name: ``'bert-base-uncased'`` and ``'owner/model'`` may be on the hub.

    Returns:
        True for absolute paths, ``./``, ``../``, ``~`` and anything with more than one slash.
    """
    return name.startswith(('/', '.', '~')) or name.count('/') > 1 or '\\' in name


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip('.') if lines else type(error).__name__

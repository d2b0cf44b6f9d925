"""The configs that travel with the package: by name on a command line, by `_base_` in a config.

In a clone they are those of configs/. mmengine resolves `package::config` for the packages of a
list of its own, and asks for a folder in the name; so ours are found here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

from mmdet_gdino_lora.errors import ConfigError

#: Where mmengine looks for a package's configs; in a clone a link to configs/.
CONFIGS = Path(__file__).resolve().parent / '.mim' / 'configs'
SCOPE = 'mmdet_gdino_lora'


def names() -> list[str]:
    """The configs that there are."""
    return sorted(path.stem for path in CONFIGS.glob('*.py'))


def config_path(name: str) -> str:
    """The path of a config of ours.

    mmdet's own tools read a config before they import this package; there it says
    ``_base_ = __import__('mmdet_gdino_lora').config_path('gdino_lora_coco')``.

    Args:
        name: Such as ``gdino_lora_coco``, with or without ``.py``.

    Returns:
        Path of the file.

    Raises:
        ConfigError: There is none of that name.
    """
    stem = name.removesuffix('.py')
    if stem not in names():
        raise ConfigError(
            f'{SCOPE}::{name}: the package has no such config; it has {", ".join(names())}'
        )
    return str(CONFIGS / f'{stem}.py')


def typed_config(word: str) -> str:
    """What a person typed for a config: a file, or the name of one of ours.

    Args:
        word: From a command line.

    Returns:
        The path of ours where the word is its name and no file lies there; else the word.

    Raises:
        ConfigError: It says ``mmdet_gdino_lora::`` and something that is not there.
    """
    scope, mark, name = word.rpartition('::')
    if mark and scope == SCOPE:
        return config_path(name)
    if not os.path.exists(word) and word.removesuffix('.py') in names():
        return config_path(word)
    return word


def tell_mmengine() -> None:
    """Lets mmengine find ``_base_ = 'mmdet_gdino_lora::gdino_lora_coco.py'``, from now on."""
    from mmengine.config import Config

    found_by_mmengine = Config._get_cfg_path
    if hasattr(found_by_mmengine, 'knows_ours'):
        return

    def path_of(cfg_path: str, filename: str) -> tuple[str, Optional[str]]:
        scope, mark, name = cfg_path.partition('::')
        if mark and scope == SCOPE:
            return config_path(name), None  # ours have no registries of their own: no scope
        return found_by_mmengine(cfg_path, filename)

    path_of.knows_ours = found_by_mmengine  # type: ignore[attr-defined]
    Config._get_cfg_path = staticmethod(path_of)

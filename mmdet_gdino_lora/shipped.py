"""The configs that travel with the package, by name: in a clone those of configs/."""

from __future__ import annotations

from pathlib import Path

#: Where mmengine looks for a package's configs; in a clone a link to configs/.
CONFIGS = Path(__file__).resolve().parent / '.mim' / 'configs'


def shipped_config(name: str) -> str:
    """The path of a config of ours.

    Args:
        name: Such as ``gdino_lora_coco.py``.
    """
    return str(CONFIGS / name)

"""LoRA fine-tuning of Grounding DINO in MMDetection 3, with the training objective of its paper.

Importing the package registers everything a config can name::

    custom_imports = dict(imports=['mmdet_gdino_lora'])

Only where a command line is being read this waits until that is understood: its help and its
mistakes need neither torch nor mmdet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmdet_gdino_lora.start import a_command_starts, load

if TYPE_CHECKING:
    from mmdet_gdino_lora.public import *  # noqa: F403

if not a_command_starts():
    load()

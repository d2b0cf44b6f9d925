"""Adapters: where they go, how they are stored, and what they stand on."""

from .adapters import base_only, load_adapter, set_adapter
from .base import load_base
from .checkpoint import install_hooks
from .files import export_adapter
from .gradients import GradientCheck
from .inject import Report, describe, inject, set_frozen_eval
from .presets import GROUPS, PRESETS
from .state import ADAPTER, LoraState, lora_state

__all__ = [
    'ADAPTER',
    'GROUPS',
    'GradientCheck',
    'PRESETS',
    'LoraState',
    'Report',
    'base_only',
    'describe',
    'export_adapter',
    'inject',
    'install_hooks',
    'load_adapter',
    'load_base',
    'lora_state',
    'set_adapter',
    'set_frozen_eval',
]

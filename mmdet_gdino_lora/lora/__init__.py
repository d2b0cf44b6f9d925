"""Adapters: where they go, how they are stored, and what they stand on."""

from mmdet_gdino_lora.lora.adapters import base_only, load_adapter, set_adapter
from mmdet_gdino_lora.lora.inject.freezing import evaluating, set_frozen_eval
from mmdet_gdino_lora.lora.inject.gradients import GradientCheck
from mmdet_gdino_lora.lora.inject.injection import inject
from mmdet_gdino_lora.lora.inject.presets import GROUPS, PRESETS
from mmdet_gdino_lora.lora.inject.report import Report, describe
from mmdet_gdino_lora.lora.state import LoraState, lora_state
from mmdet_gdino_lora.lora.store.base import load_base
from mmdet_gdino_lora.lora.store.checkpoint import install_hooks
from mmdet_gdino_lora.lora.store.folder import export_adapter, write_card
from mmdet_gdino_lora.lora.tensors import ADAPTER, IMAGE_TOWER, trained_factors

__all__ = [
    'ADAPTER',
    'GROUPS',
    'GradientCheck',
    'IMAGE_TOWER',
    'PRESETS',
    'LoraState',
    'Report',
    'base_only',
    'describe',
    'evaluating',
    'export_adapter',
    'inject',
    'install_hooks',
    'load_adapter',
    'load_base',
    'lora_state',
    'set_adapter',
    'set_frozen_eval',
    'trained_factors',
    'write_card',
]

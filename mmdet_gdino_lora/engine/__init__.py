"""Hooks, checks of the config, and what else the runner needs."""

from mmdet_gdino_lora.engine.preflight import PreflightHook, check_config
from mmdet_gdino_lora.engine.safe_load import allow_mmengine_checkpoints

__all__ = ['PreflightHook', 'allow_mmengine_checkpoints', 'check_config']

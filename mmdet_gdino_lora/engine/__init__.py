"""Hooks, checks of the config, and what else the runner needs."""

from mmdet_gdino_lora.engine.preflight import PreflightHook, check_config

__all__ = ['PreflightHook', 'check_config']

"""The merged detector without a trace of adapters, as a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmdet.registry import MODELS
from torch import Tensor

from mmdet_gdino_lora.transformer import LeanGroundingDINO

_OF_TRAINING = ('lora', 'base_checkpoint', 'base_dtype', 'retain', 'dn_cfg', 'full_checkpoint')
"""Arguments of the detector that say nothing about what it computes."""


def plain_detector(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> LeanGroundingDINO:
    """Builds a config's detector from merged weights, in float32 on the CPU.

    Args:
        config: ``model`` of the config that the adapter was trained with.
        weights: As ``merged_weights`` returns them.

    Returns:
        The detector in eval mode.
    """
    values = copy.deepcopy({k: v for k, v in config.items() if k not in _OF_TRAINING})
    detector = MODELS.build(dict(values, lora=None, dn_cfg=None))
    own = detector.state_dict()
    # strictly, but for what only training reads
    detector.load_state_dict({name: weights[name] for name in own})
    return detector.eval().requires_grad_(False)

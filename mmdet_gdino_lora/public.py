"""All that the package offers: what a config can name is registered by this import."""

from __future__ import annotations

from mmdet_gdino_lora.environment import check_environment

check_environment()

from mmdet_gdino_lora.datasets import TokenSpans  # noqa: E402
from mmdet_gdino_lora.detector import LoRAGroundingDINO  # noqa: E402
from mmdet_gdino_lora.engine.checkpoint_hook import AdapterCheckpointHook  # noqa: E402
from mmdet_gdino_lora.engine.compile_hook import CompileHook  # noqa: E402
from mmdet_gdino_lora.engine.nonfinite_hook import NonFiniteHook  # noqa: E402
from mmdet_gdino_lora.engine.optimizer import FrozenBaseConstructor  # noqa: E402
from mmdet_gdino_lora.engine.preempt_hook import PreemptHook  # noqa: E402
from mmdet_gdino_lora.engine.seed_hook import ResumableSeedHook  # noqa: E402
from mmdet_gdino_lora.evaluation.lvis import mend_lvis  # noqa: E402
from mmdet_gdino_lora.files.loaders import register_loaders  # noqa: E402
from mmdet_gdino_lora.frozen.hook import FrozenFeaturesHook  # noqa: E402
from mmdet_gdino_lora.head import GroundingDINOCriterionHead  # noqa: E402
from mmdet_gdino_lora.objective import BoxGIoUCost, BoxL1Cost, TokenFocalCost  # noqa: E402
from mmdet_gdino_lora.objective.criterion import GroundingDINOCriterion, build_criterion  # noqa: E402
from mmdet_gdino_lora.report.hook import ReportHook  # noqa: E402
from mmdet_gdino_lora.shipped import config_path, tell_mmengine  # noqa: E402
from mmdet_gdino_lora.text import GroundingTextEncoder  # noqa: E402

register_loaders()
mend_lvis()
tell_mmengine()

__all__ = [
    'AdapterCheckpointHook',
    'BoxGIoUCost',
    'BoxL1Cost',
    'CompileHook',
    'FrozenBaseConstructor',
    'FrozenFeaturesHook',
    'GroundingDINOCriterion',
    'GroundingDINOCriterionHead',
    'GroundingTextEncoder',
    'LoRAGroundingDINO',
    'NonFiniteHook',
    'PreemptHook',
    'ReportHook',
    'ResumableSeedHook',
    'TokenFocalCost',
    'TokenSpans',
    'build_criterion',
    'config_path',
]

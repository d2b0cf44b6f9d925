"""The objective: matching of queries to targets, and the losses of the matched pairs."""

from mmdet_gdino_lora.objective.costs import BatchedCost, BoxGIoUCost, BoxL1Cost, TokenFocalCost
from mmdet_gdino_lora.objective.criterion import GroundingDINOCriterion, build_criterion
from mmdet_gdino_lora.objective.matcher import HungarianMatcher

__all__ = [
    'BatchedCost',
    'BoxGIoUCost',
    'BoxL1Cost',
    'GroundingDINOCriterion',
    'HungarianMatcher',
    'TokenFocalCost',
    'build_criterion',
]

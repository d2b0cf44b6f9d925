"""Matching of queries to targets: the costs and the batched Hungarian matcher."""

from mmdet_gdino_lora.objective.costs import BatchedCost, BoxGIoUCost, BoxL1Cost, TokenFocalCost
from mmdet_gdino_lora.objective.matcher import HungarianMatcher

__all__ = ['BatchedCost', 'BoxGIoUCost', 'BoxL1Cost', 'HungarianMatcher', 'TokenFocalCost']

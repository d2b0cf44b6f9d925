"""Matching of queries to targets: the costs and the batched Hungarian matcher."""

from .costs import BatchedCost, BoxGIoUCost, BoxL1Cost, TokenFocalCost
from .matcher import HungarianMatcher

__all__ = ['BatchedCost', 'BoxGIoUCost', 'BoxL1Cost', 'HungarianMatcher', 'TokenFocalCost']

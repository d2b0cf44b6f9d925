"""What the loader adds to mmdet's datasets."""

from .token_spans import TokenSpans

__all__ = ['TokenSpans']

"""What the loader adds to mmdet's datasets."""

from mmdet_gdino_lora.datasets.token_spans import TokenSpans

__all__ = ['TokenSpans']

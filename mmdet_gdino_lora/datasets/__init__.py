"""What the loader adds to mmdet's datasets."""

import warnings

from mmdet_gdino_lora.datasets.token_spans import TokenSpans

# Configs ask for pinned memory whatever the machine is; each loader would say that there is no GPU.
warnings.filterwarnings('ignore', message="'pin_memory' argument is set as true but no accelerator")

__all__ = ['TokenSpans']

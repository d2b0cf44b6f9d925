"""What holds in the tests' processes and in those that they start."""

from __future__ import annotations

import ast
import gc
from typing import Any

import mmengine.config.config as mmengine_config
from mmdet.models.layers.transformer import dino_layers
from yapf.yapflib import yapf_api


def _formatted_by_python(text: str, **_: Any) -> tuple[str, bool]:
    """mmengine lays a run's config out with yapf, up to three seconds a run, for its log."""
    return ast.unparse(ast.parse(text)) + '\n', True


# OneDL's mmengine takes it from yapf whenever it formats, OpenMMLab's once.
yapf_api.FormatCode = _formatted_by_python
if hasattr(mmengine_config, 'FormatCode'):
    mmengine_config.FormatCode = yapf_api.FormatCode


def _in_the_width_that_the_decoder_takes(encoding: Any) -> Any:
    return lambda boxes, num_feats=128: encoding(boxes)


# Stock Grounding DINO, which tests compare with, stops in its decoder with OneDL's mmdet 3.5.1:
# boxes are encoded in twice the width of its `ref_point_head`.
dino_layers.coordinate_to_encoding = _in_the_width_that_the_decoder_takes(
    dino_layers.coordinate_to_encoding
)

# mmengine collects garbage whenever a data set is built: a third of a second each, if it had to
# look at all that was imported.
gc.freeze()

"""Tests. What is here holds in the test's process and in those that it starts."""

from __future__ import annotations

import functools
from typing import Any

import mmengine.config.config as mmengine_config
from yapf.yapflib import yapf_api


def _format_once(format_code: Any) -> Any:
    """mmengine formats a run's config half a dozen times, half a second each: once will do."""

    @functools.lru_cache(maxsize=64)
    def formatted(text: str, style: tuple) -> Any:
        return format_code(text, style_config=dict(style))

    return lambda text, style_config, **_: formatted(text, tuple(style_config.items()))


# OneDL's mmengine takes it from yapf whenever it formats, OpenMMLab's once.
yapf_api.FormatCode = _format_once(yapf_api.FormatCode)
if hasattr(mmengine_config, 'FormatCode'):
    mmengine_config.FormatCode = yapf_api.FormatCode

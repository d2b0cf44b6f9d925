"""torch.compile of the part that it can trace."""

from __future__ import annotations

from typing import Any

import torch
from mmdet.registry import HOOKS
from mmengine.hooks import Hook

from mmdet_gdino_lora.engine.wrapped import detector_of


@HOOKS.register_module()
class CompileHook(Hook):
    """Compiles the image tower (backbone and neck) with torch.compile.

    mmengine's own ``compile=`` compiles the whole training step, whose captions and matching can't
    be traced. A frozen text tower is remembered rather than computed, and has nothing to gain.

    Args:
        **options: Of ``torch.compile``, such as ``backend`` and ``mode``.

    Example::

        custom_hooks = [dict(type='CompileHook')]
    """

    def __init__(self, **options: Any) -> None:
        self.options = options

    def before_run(self, runner: Any) -> None:
        """Compiles.

        Args:
            runner: mmengine's runner.
        """
        detector = detector_of(runner)
        detector.extract_feat = torch.compile(detector.extract_feat, **self.options)

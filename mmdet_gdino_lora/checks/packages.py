"""Packages that data sets and metrics of mmdet's need, and that mmdet doesn't bring."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.walk import datasets_of, metrics_of

_LVIS = ('lvis', 'lvis')
NEEDED = dict(
    DODDataset=('d_cube', 'ddd-dataset'),
    DumpODVGResults=('jsonlines', 'jsonlines'),
    LVISDataset=_LVIS,
    LVISFixedAPMetric=_LVIS,
    LVISMetric=_LVIS,
    LVISV05Dataset=_LVIS,
    LVISV1Dataset=_LVIS,
)
"""Types of data sets and metrics, the module each imports, and what pip calls it."""


def check_packages(cfg: Mapping[str, Any], stages: Sequence[str]) -> Iterator[Finding]:
    """Finds data sets and metrics whose package isn't installed.

    mmdet says so when it builds them, behind the model; a metric of the validation even later.

    Args:
        cfg: The runner's config.
        stages: The loops that will run: some of ``'train'``, ``'val'`` and ``'test'``.

    Yields:
        What was found.
    """
    for stage in stages:
        loader, evaluator = f'{stage}_dataloader', f'{stage}_evaluator'
        parts = [*datasets_of(loader, cfg.get(loader)), *metrics_of(evaluator, cfg.get(evaluator))]
        for key, part in parts:
            kind = str(getattr(part.get('type'), '__name__', part.get('type'))).rpartition('.')[2]
            module, package = NEEDED.get(kind, ('', ''))
            if module and find_spec(module) is None:
                without = ''
                if stage == 'val' and 'train' in stages:
                    without = (
                        ', or train without validation: val_dataloader=None, val_cfg=None, '
                        'val_evaluator=None'
                    )
                yield Finding(
                    f'{key}.type={kind!r} needs the package {module}, which is not installed; pip '
                    f'install {package}{without}',
                    fatal=True,
                )

"""What two lines change of an mmdet config: one table, in the log and in docs/two_lines.md.

Everything that a config of mmdet's says and that a ``LoRAGroundingDINO`` takes otherwise stands in
there, and what it keeps, too, where people would ask.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mmdet.models.dense_heads.detr_head import DETRHead
from mmengine.logging import MMLogger

from mmdet_gdino_lora.engine.learning_rates import multiplied_rates, rate_of
from mmdet_gdino_lora.head import LOSSES, MMDET_DEFAULTS, criterion_settings
from mmdet_gdino_lora.lora import GROUPS, lora_state
from mmdet_gdino_lora.lora.inject.presets import group_of
from mmdet_gdino_lora.lora.tensors import base_name, is_factor

Row = tuple[str, str, str]

HEADING: Row = ('', "mmdet's GroundingDINO", 'LoRAGroundingDINO')


def tell_changes(detector: Any, cfg: Mapping[str, Any]) -> None:
    """Says in the log what becomes of a run's config, which may not have been written for this.

    Args:
        detector: An injected ``LoRAGroundingDINO``.
        cfg: The run's config; empty where there is no run.
    """
    logger = MMLogger.get_current_instance()
    if is_two_lines(cfg):
        table = as_text(changes(detector, cfg))
        logger.info('What two lines change of this config:\n%s', table)
    trained = [name for name, p in detector.named_parameters() if p.requires_grad]
    phrases = multiplied_rates(cfg, trained)
    if phrases:
        logger.warning(
            'optim_wrapper.paramwise_cfg.custom_keys also multiplies the learning rate of '
            'adapters: %s; leave the keys out if the adapters there shall learn as the others '
            'do (the base is frozen anyway).',
            ', '.join(phrases),
        )


def is_two_lines(cfg: Mapping[str, Any]) -> bool:
    """Tells whether a run's config is mmdet's own with the detector's name exchanged.

    Args:
        cfg: The run's config.

    Returns:
        False for configs that name this project's head, and say all of this themselves.
    """
    head = (cfg.get('model') or {}).get('bbox_head') or {}
    return str(head.get('type')).rpartition('.')[2] == 'GroundingDINOHead'


def changes(detector: Any, cfg: Mapping[str, Any]) -> list[Row]:
    """Compares what mmdet's own detector would make of a config with what this detector makes.

    Args:
        detector: An injected ``LoRAGroundingDINO``.
        cfg: The run's config.

    Returns:
        Rows of a table, its heading first: what, mmdet's, this detector's.
    """
    model = cfg['model']
    return [
        HEADING,
        *_weights(model['bbox_head'], detector.bbox_head.criterion),
        *_targets(model, detector),
        *_groups(detector, cfg),
        *_files(detector),
    ]


def as_text(rows: Iterable[Row]) -> str:
    """Writes the table for a log.

    Args:
        rows: Of :func:`changes`.

    Returns:
        Lines of aligned columns.
    """
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return '\n'.join(
        f'{what.ljust(widths[0])}  {stock.ljust(widths[1])}  {ours}' for what, stock, ours in rows
    )


def as_markdown(rows: Iterable[Row]) -> str:
    """Writes the table for a page.

    Args:
        rows: Of :func:`changes`.

    Returns:
        A table in Markdown.
    """
    heading, *rest = rows
    lines = [heading, ('---',) * 3, *rest]
    return ''.join(f'| {" | ".join(line)} |\n' for line in lines)


def _weights(head: Mapping[str, Any], criterion: Any) -> Iterator[Row]:
    for loss, name in (('loss_cls', 'ce'), ('loss_bbox', 'bbox'), ('loss_iou', 'giou')):
        stock = head.get(loss) or inspect.signature(DETRHead).parameters[loss].default
        ours = criterion.weight_dict.get(f'loss_{name}')
        yield (
            f'weight of {loss}',
            f'{stock.get("loss_weight", MMDET_DEFAULTS["loss_weight"]):g}',
            'none' if ours is None else f'{ours:g}, as loss_{name}',
        )
    left = criterion_settings({loss: head.get(loss) for loss in LOSSES})[1]
    if left:
        yield 'other settings of the losses', ', '.join(left), 'not used'


def _targets(model: Mapping[str, Any], detector: Any) -> Iterator[Row]:
    criterion = detector.bbox_head.criterion
    yield (
        "target of the encoder's class loss",
        'tokens of the class',
        {'objectness': 'object or not (enc_target)', 'tokens': 'tokens of the class'}.get(
            getattr(criterion, 'enc_target', ''), "the criterion's own"
        ),
    )
    costs = ((model.get('train_cfg') or {}).get('assigner') or {}).get('match_costs') or ()
    stock = ', '.join(f'{cost["type"]} {cost.get("weight", 1):g}' for cost in costs)
    yield 'matching costs', stock, str(getattr(criterion, 'matcher', "the criterion's own"))
    group = (model.get('dn_cfg') or {}).get('group_cfg') or {}
    queries = group.get('num_dn_queries', group.get('num_groups'))
    denoises = detector.dn_query_generator is not None
    yield 'denoising queries', f'{queries}', f'{queries}' if denoises else 'none (dn_cfg=None)'


def _groups(detector: Any, cfg: Mapping[str, Any]) -> Iterator[Row]:
    """What is trained of each part of the model, and how fast."""
    trained = lora_state(detector).trained
    for group in [*GROUPS, None]:
        names = [
            n for n in map(base_name, dict(detector.named_parameters())) if group_of(n) == group
        ]
        stock = [name for name in names if not is_factor(name)]
        if not stock:
            continue
        factors = [name for name in names if is_factor(name) and name in trained]
        whole = [name for name in stock if name in trained]
        parts = []
        if factors:
            parts.append(f'adapters{_rates(cfg, factors)}')
        if whole:
            parts.append(f'{len(whole)} of {len(stock)} weights{_rates(cfg, whole)}')
        yield (
            f'trained: {group or "the rest"}',
            f'all{_rates(cfg, stock)}',
            ' and '.join(parts) or 'nothing: frozen, without dropout',
        )


def _rates(cfg: Mapping[str, Any], names: Iterable[str]) -> str:
    rates = sorted({rate for name in names if (rate := rate_of(cfg, name)) is not None})
    return f', lr {" and ".join(f"{rate:g}" for rate in rates)}' if rates else ''


def _files(detector: Any) -> Iterator[Row]:
    full = lora_state(detector).full_checkpoint
    yield (
        'checkpoints',
        'the model',
        'the model and adapters' if full else 'what differs from the base',
    )

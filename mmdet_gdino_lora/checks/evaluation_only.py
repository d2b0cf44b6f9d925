"""Configs of mmdet's that say how to evaluate, and nothing of training but what their base has.

Their ``train_dataloader`` is plain COCO's, without class names, and their optimizer that of a
Faster R-CNN; trained from such a config, the model would be shown no text at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.walk import datasets_of

_ORIGINAL = 'mmdet::grounding_dino/grounding_dino_'
_TO_TRAIN = {
    ('SwinTransformer', 96, 256): 'mmdet::mm_grounding_dino/coco/grounding_dino_swin-t_finetune_'
    '16xb4_1x_coco.py',
    ('SwinTransformer', 96, 80): f'{_ORIGINAL}swin-t_finetune_16xb2_1x_coco.py',
    ('SwinTransformer', 128, 80): f'{_ORIGINAL}swin-b_finetune_16xb2_1x_coco.py',
}
"""Configs that train the same model: backbone, its width, and the head's number of classes."""

_LINES = (
    "train_dataloader=dict(dataset=dict(return_classes=True, pipeline=...)) with 'text' and "
    "'custom_entities' in its PackDetInputs.meta_keys, optim_wrapper=dict(_delete_=True, "
    "type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.0001, weight_decay=0.0001), "
    'clip_grad=dict(max_norm=0.1, norm_type=2)) and train_cfg=dict(max_epochs=12)'
)


def check_texts_arrive(cfg: Mapping[str, Any]) -> Iterator[Finding]:
    """Finds training data whose pipeline hands no text to the model.

    Args:
        cfg: The runner's config.

    Yields:
        What was found, of the first such data set.
    """
    if 'language_model' not in (cfg.get('model') or {}):
        return
    for key, dataset in datasets_of('train_dataloader', cfg.get('train_dataloader')):
        for step in dataset.get('pipeline') or ():
            kind = str(getattr(step.get('type'), '__name__', step.get('type'))).rpartition('.')[2]
            if kind == 'PackDetInputs' and 'text' not in (step.get('meta_keys') or ()):
                yield Finding(_sentence(key, dataset, cfg), fatal=True)
                return


def _sentence(key: str, dataset: Mapping[str, Any], cfg: Mapping[str, Any]) -> str:
    found = f"{key}.pipeline: 'text' is not among PackDetInputs.meta_keys"
    if dataset.get('return_classes'):
        return f'{found}, so no class name would reach the model; add it there'
    base = _TO_TRAIN.get(_model(cfg.get('model') or {}))
    inherit = f'inherit _base_={base!r}, which trains the same model, or ' if base else ''
    return (
        f'{found} and return_classes is not set, so no class name would reach the model: the '
        f'config is for evaluation only; to train, {inherit}set {_LINES}'
    )


def _model(model: Mapping[str, Any]) -> tuple[Any, ...]:
    backbone, head = model.get('backbone') or {}, model.get('bbox_head') or {}
    return backbone.get('type'), backbone.get('embed_dims'), head.get('num_classes')

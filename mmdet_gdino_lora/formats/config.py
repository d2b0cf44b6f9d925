"""The config that is written for a folder of photos: short, and for a person to change."""

from __future__ import annotations

import dataclasses
import pprint
from collections.abc import Mapping, Sequence
from typing import Optional

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.shipped import SCOPE

#: Photos to train from up to which the config for few images is inherited.
FEW = 1000
#: Images per step of the drawn shapes' config, and steps of a run from them.
_BATCH, _STEPS = 8, 300
#: Epochs where all photos are one batch: with more of them, shapes learned less.
_ONE_BATCH_EPOCHS = 60
#: Photos to measure on from which on the best checkpoint is no matter of chance.
_ENOUGH = 20
#: What the inherited config has stays, whichever that is.
_HOOKS = (
    '# When training has ended: report.html and thresholds.json in the work dir.\n'
    "custom_hooks = [*_base_.get('custom_hooks', []), dict(type='ReportHook')]\n"
)
_LAST = f'# With less than {_ENOUGH} photos to measure on, which checkpoint is best is chance.\n'


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config is made of.

    Attributes:
        base: Name of the config that it inherits from.
        made_from: The comment at its top.
        photos: Folder of the photos by split: train, val, and test where there is one.
        folder: Name of the folder beside the config that holds the annotation files.
        classes: Class names in the order of the annotation files.
        prompts: What the captions say for some of them.
        samples: Whether the names are too many for one caption.
        retained: Names that the base must not forget; None: as in the inherited config.
        checkpoint: The base, where it isn't the inherited config's.
        images: Photos to train from.
        measured: Photos to measure on while it trains.
        many: Whether there are more classes than the inherited config has labels for.
    """

    base: str
    made_from: str
    photos: Mapping[str, str]
    folder: str
    classes: Sequence[str]
    prompts: Mapping[str, str]
    samples: bool
    retained: Optional[Sequence[str]]
    checkpoint: Optional[str]
    images: int
    measured: int
    many: bool

    @property
    def is_drawn(self) -> bool:
        """Whether it stands on the base of the drawn shapes."""
        return self.base == 'gdino_lora_shapes'


def config_text(plan: Plan) -> str:
    """Writes a config.

    Args:
        plan: What it is made of.

    Returns:
        Python code.
    """
    pipelines = _pipelines(plan)
    parts = [_head(plan), _model(plan), pipelines]
    splits = ['train', 'val', 'test'] if 'test' in plan.photos else ['train', 'val']
    parts += [_loader(split, plan, bool(pipelines)) for split in splits]
    if 'test' in splits:
        tested = "dict(ann_file=annotations + 'test.json')\n"
    else:
        parts.append('test_dataloader = val_dataloader\n')
        tested = 'val_evaluator\n'
    parts.append("val_evaluator = dict(ann_file=annotations + 'val.json')\n")
    parts.append(f'test_evaluator = {tested}')
    parts.append(_HOOKS)
    if plan.is_drawn:
        parts.append(_schedule(plan))
    elif plan.measured < _ENOUGH:
        parts.append(f'{_LAST}default_hooks = dict(checkpoint=dict(save_best=None))\n')
    return ''.join(parts)


def _head(plan: Plan) -> str:
    classes = pprint.pformat(tuple(plan.classes), width=96, compact=True)
    code = (
        f'# {plan.made_from}\n# What is not here is in the config that it inherits from.\n'
        f"_base_ = '{SCOPE}::{plan.base}.py'\n\n"
        f'photos = {plan.photos["train"] + "/"!r}\n'
    )
    if plan.photos['val'] != plan.photos['train']:
        code += f'val_photos = {plan.photos["val"] + "/"!r}\n'
    here = '{{ fileDirname }}'
    return (
        f'{code}# Written beside this file; nothing was written into the folder of the photos.\n'
        f"annotations = '{here}/{plan.folder}/'\n"
        f'classes = {classes}\nmetainfo = dict(classes=classes)\n\n'
    )


def _model(plan: Plan) -> str:
    code = ''
    if plan.checkpoint is not None:
        code += f'    base_checkpoint={plan.checkpoint!r},\n'
    if plan.many:
        code += (
            '    # Denoising has a label for each class.\n'
            f'    bbox_head=dict(num_classes={len(plan.classes)}),\n'
        )
    if plan.is_drawn:
        code += '    retain=None,  # a base of drawn shapes knows nothing that must survive\n'
    elif plan.retained is not None and list(plan.retained):
        code += (
            '    # What the base must not forget; names of the photos themselves can not be here.\n'
            f'    retain=dict(names={list(plan.retained)!r}),\n'
        )
    elif plan.retained is not None:
        code += (
            '    # Name what the base must not forget: retain=dict(names=[...]).\n'
            '    retain=None,\n'
        )
    return f'model = dict(\n{code})\n' if code else ''


def _pipelines(plan: Plan) -> str:
    """Both pipelines, each step with what is changed of it; empty where nothing is."""
    code, steps, spans = '', [], []
    if plan.prompts:
        words = pprint.pformat(dict(plan.prompts), width=88)
        code += (
            '# What the model reads in the place of names; results and metrics keep the names.\n'
        )
        code += f'prompts = {words}\n'
        spans.append('prompts=prompts')
        steps.append('TokenSpans=dict(prompts=prompts)')
    if plan.is_drawn:
        code += '# A larger scale is slower and finds smaller things.\n'
        steps.append('Resize=dict(scale=(192, 192))')
    if not (steps or plan.samples):
        return ''
    code += f'changes = dict({", ".join(steps)})\n'
    names = dict(train='changes', test='changes')
    if plan.samples:
        spans.append("num_negatives='fit'")
        code += (
            '# All names are too many for a caption: an image has its own, and as many others as '
            'fit.\n'
            f'train_changes = dict(changes, TokenSpans=dict({", ".join(spans)}))\n'
        )
        names['train'] = 'train_changes'
    for stage, name in names.items():
        code += (
            f'{stage}_pipeline = [\n'
            f"    dict(step, **{name}.get(step['type'], {{}})) for step in "
            f'_base_.{stage}_pipeline\n]\n'
        )
    return code + '\n'


def _loader(split: str, plan: Plan, changed: bool) -> str:
    other = split == 'val' and plan.photos['val'] != plan.photos['train']
    root = 'val_photos' if other else 'photos'
    pipeline = f', pipeline={"train" if split == "train" else "test"}_pipeline' if changed else ''
    return (
        f'{split}_dataloader = dict(dataset=dict(\n'
        f"    data_root={root}, metainfo=metainfo, data_prefix=dict(img=''),\n"
        f"    ann_file=annotations + '{split}.json'{pipeline}))\n"
    )


def _schedule(plan: Plan) -> str:
    """As many epochs as make the steps that a base of drawn shapes needs."""
    steps = -(-plan.images // _BATCH)
    epochs = _ONE_BATCH_EPOCHS if steps == 1 else max(4, round(_STEPS / steps))
    every = max(1, epochs // 5)
    best = "save_best='auto', " if plan.measured >= _ENOUGH else ''
    return (
        f'\n# {plan.images} photos in batches of {_BATCH}: some {epochs * steps} steps.\n'
        f'train_cfg = dict(max_epochs={epochs}, val_interval={every})\n'
        'param_scheduler = [\n'
        "    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=10),\n"
        f"    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end={epochs}, "
        'eta_min_ratio=0.05,\n'
        '         convert_to_iter_based=True),\n'
        ']\n'
        f'{"" if best else _LAST}'
        f"default_hooks = dict(checkpoint=dict(type='AdapterCheckpointHook', {best}"
        f'interval={every}))\n'
    )


def need_words(names: Sequence[str], given: Sequence[str]) -> dict[str, str]:
    """Reads ``--names``.

    Args:
        names: Class names of the photos.
        given: ``RBC=red blood cell`` and the like.

    Returns:
        What captions say, by class name.

    Raises:
        ConfigError: One is no such pair, or of no class.
    """
    words: dict[str, str] = {}
    for pair in given:
        name, mark, said = pair.partition('=')
        if not mark or not said.strip():
            raise ConfigError(
                f'--names {pair!r}: write CLASS="words", such as RBC="red blood cell"'
            )
        if name not in names:
            raise ConfigError(
                f'--names {pair!r}: the labels have no class {name!r}; they have '
                f'{", ".join(map(repr, list(names)[:20]))}'
            )
        words[name] = said.strip()
    return words

"""The detector's own settings: adapters that can learn, and names that can be retained."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from peft import LoraConfig

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.nearest import nearest
from mmdet_gdino_lora.text.caption import clean_name

RETAIN = ('names', 'weight', 'every')
"""Keys of ``model.retain``."""


def check_lora(lora: Any) -> Iterator[Finding]:
    """Checks the numbers of an adapter, which PEFT would take as they come or blame on layers.

    Args:
        lora: The config's ``model.lora``.

    Yields:
        What was found.
    """
    if lora is None:
        return
    if not isinstance(lora, Mapping):
        example = lora if _is_whole(lora) else 16
        yield Finding(
            f'model.lora={lora!r} is no dict; write lora=dict(preset=..., r={example})', fatal=True
        )
        return
    yield from _unknown(lora)
    ranks = {'r': lora['r']} if 'r' in lora else {}
    alphas = {'lora_alpha': lora['lora_alpha']} if lora.get('lora_alpha') is not None else {}
    for pattern, values in dict(rank_pattern=ranks, alpha_pattern=alphas).items():
        if isinstance(lora.get(pattern), Mapping):
            values.update({f'{pattern}[{k!r}]': v for k, v in lora[pattern].items()})
    for key, value in ranks.items():
        if not _is_whole(value):
            yield Finding(
                f'model.lora.{key}={value!r} is no whole number above 0; set the rank of the '
                'adapters, usually 8 to 64',
                fatal=True,
            )
    for key, value in alphas.items():
        if not _is_number(value):
            yield Finding(
                f'model.lora.{key}={value!r} is no number above 0; leave it out, and it is twice '
                'the rank',
                fatal=True,
            )
        elif value <= 0:
            yield Finding(
                f'model.lora.{key}={value!r}: adapters are multiplied by it, and would '
                f'{"change nothing" if value == 0 else "pull the wrong way"}; set a number above '
                '0, or leave it out, and it is twice the rank',
                fatal=True,
            )
    dropout = lora.get('lora_dropout', 0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        yield Finding(
            f'model.lora.lora_dropout={dropout!r} is no probability; set a number from 0 to below '
            '1, such as 0.05',
            fatal=True,
        )


def _unknown(lora: Mapping[str, Any]) -> Iterator[Finding]:
    known = [field.name for field in dataclasses.fields(LoraConfig)]
    for key in lora:
        if key not in known and key != 'preset':
            near = nearest(key, [*known, 'preset'])
            hint = f' (did you mean {near!r}?)' if near else ''
            yield Finding(
                f'model.lora.{key} is neither "preset" nor a field of peft.LoraConfig{hint}, which '
                f'has {", ".join(sorted(known))}.',
                fatal=True,
            )


def check_retain(retain: Any) -> Iterator[Finding]:
    """Checks what is to be retained, as far as no tokenizer is needed.

    Args:
        retain: The config's ``model.retain``.

    Yields:
        What was found.
    """
    if not retain:
        return
    if isinstance(retain, (list, tuple)):
        names = list(retain)
        yield Finding(
            f'model.retain={names!r} is a list; write retain=dict(names={names!r})', fatal=True
        )
        return
    if not isinstance(retain, Mapping) or not set(retain) <= set(RETAIN):
        yield Finding(
            f'model.retain={retain!r} is no dict of the keys names, weight and every; write '
            "retain=dict(names=['person', 'dog'])",
            fatal=True,
        )
        return
    wanted, weight, every = retain.get('names'), retain.get('weight', 1.0), retain.get('every', 1)
    if isinstance(wanted, str) or not wanted or not all(isinstance(name, str) for name in wanted):
        yield Finding(
            f'model.retain.names={wanted!r}: give a list of the class names that must survive',
            fatal=True,
        )
        return
    if not _is_number(weight) or weight <= 0:
        yield Finding(f'model.retain.weight={weight!r} is not a number above 0', fatal=True)
    if not _is_whole(every):
        yield Finding(f'model.retain.every={every!r} is not a whole number from 1 on', fatal=True)
    counts = Counter(clean_name(name).strip().lower() for name in wanted)
    twice = [name for name, count in counts.items() if count > 1]
    if twice:
        yield Finding(
            f'model.retain.names holds {len(twice)} of {len(counts)} names more than once, which '
            f'would weigh them more and fill the caption; first: {twice[0]!r}; name each once'
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

"""``TokenSpans.prompts``: is every key a category, every value a word, and testing the same?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.nearest import nearest
from mmdet_gdino_lora.checks.words import some
from mmdet_gdino_lora.text import prompted
from mmdet_gdino_lora.text.prompts import renamed, unknown_prompts


def prompts_of(dataset: Mapping[str, Any]) -> Any:
    """Finds the ``prompts`` in a data set's pipeline.

    Args:
        dataset: Its config.

    Returns:
        As they stand there; empty where there are none.
    """
    steps = [step for step in dataset.get('pipeline') or () if step.get('type') == 'TokenSpans']
    return (steps[-1].get('prompts') if steps else None) or {}


def asked_for(dataset: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Tells what the captions of a data set say for its categories.

    Args:
        dataset: Its config, whose prompts have their form.
        names: Its category names.

    Returns:
        Per category, the words in its place, or its name.
    """
    said = renamed(prompted(names, dataset.get('caption_prompt')), prompts_of(dataset))
    return [name if isinstance(name, str) else name.name for name in said]


def check_form(key: str, prompts: Any) -> Iterator[Finding]:
    """Checks that prompts are words by category name.

    Args:
        key: Where they stand.
        prompts: The config's.

    Yields:
        What was found.
    """
    meaning = "write what the caption says by category name: prompts={'cls_07': 'wheel bolt'}"
    if not isinstance(prompts, Mapping):
        yield Finding(f'{key}={prompts!r} is no dict; {meaning}', fatal=True)
        return
    for name, words in prompts.items():
        if not isinstance(name, str) or not isinstance(words, str) or not words.strip():
            yield Finding(f'{key}[{name!r}]={words!r} is no word; {meaning}', fatal=True)
            return


def check_known(key: str, prompts: Mapping[str, str], names: Iterable[str]) -> Iterator[Finding]:
    """Checks that every prompt is for a category.

    Args:
        key: Where they stand.
        prompts: Of the form that they should have.
        names: The data set's category names.

    Yields:
        What was found.
    """
    names = list(names)
    unknown = unknown_prompts(names, prompts)
    if unknown:
        near = nearest(unknown[0], names)
        meant = f'did you mean {near!r}?' if near else f'they are {some(names)}'
        yield Finding(
            f'{key} has words for {some(unknown)}, of which the data set has no category; {meant}',
            fatal=True,
        )


def check_prompts(
    key: str, prompts: Any, names: Sequence[str], taught: Mapping[str, str]
) -> Iterator[Finding]:
    """Checks the prompts of one data set.

    Args:
        key: Where its pipeline stands.
        prompts: Of it.
        names: Its category names.
        taught: Prompts of the training data; the data set's own where it is trained from.

    Yields:
        What was found.
    """
    where = f'TokenSpans.prompts of {key}'
    found = list(check_form(where, prompts)) or list(check_known(where, prompts, names))
    if found or not isinstance(taught, Mapping):  # which is told where it stands
        yield from found
        return
    other = [name for name in names if prompts.get(name) != taught.get(name)]
    if other:
        name = other[0]
        yield Finding(
            f'{where} says {prompts.get(name, name)!r} for {name!r}, which training is to teach as '
            f'{taught.get(name, name)!r} ({len(other)} such names); give TokenSpans the same '
            'prompts in all pipelines'
        )

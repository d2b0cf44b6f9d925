"""What a caption says for category names, where these are no words that a model knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mmdet_gdino_lora.text.caption import ClassName, Prompt, as_prompt, clean_name


def renamed(names: Iterable[ClassName], prompts: Mapping[str, str]) -> tuple[ClassName, ...]:
    """Puts other words into the place of category names.

    Of a prompt that says more for a class (mmdet's ``caption_prompt``), prefix and suffix stay.

    Args:
        names: Class names or prompts.
        prompts: By category name, as the data set has it or cleaned, what a caption says for it.

    Returns:
        Per class its name or, where there are words for it, a prompt under its name.
    """
    if not prompts:
        return tuple(names)
    cleaned = {clean_name(name): words for name, words in prompts.items()}
    result: list[ClassName] = []
    for name in names:
        prompt = as_prompt(name)
        words = prompts.get(name) if isinstance(name, str) else None
        words = cleaned.get(prompt.class_name) if words is None else words
        if words is None:
            result.append(name)
        else:
            result.append(
                Prompt(prompt.class_name, clean_name(words).strip(), prompt.prefix, prompt.suffix)
            )
    return tuple(result)


def unknown_prompts(names: Iterable[str], prompts: Mapping[str, str]) -> list[str]:
    """Lists words that are for no category.

    Args:
        names: Category names.
        prompts: What a caption says for some.

    Returns:
        Keys of ``prompts`` that are none of the names.
    """
    known: set[str] = set()
    for name in filter(lambda name: isinstance(name, str), names):
        known |= {name, clean_name(name)}
    return [key for key in prompts if key not in known]

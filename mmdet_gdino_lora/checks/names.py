"""What the model reads of class names: words it knows, one caption that holds them all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

from mmdet_gdino_lora.checks.findings import Finding
from mmdet_gdino_lora.checks.prompts import prompts_of
from mmdet_gdino_lora.checks.words import share, some
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text import CaptionTokenizer, prompted
from mmdet_gdino_lora.text.caption import ClassName, as_prompt
from mmdet_gdino_lora.text.files import is_at_hand
from mmdet_gdino_lora.text.prompts import renamed
from mmdet_gdino_lora.text.readable import readable

_RENAME = (
    "rename them, or give the model another word with TokenSpans(prompts={<class>: '...'}) or the "
    "data set's caption_prompt={<class>: dict(name='...')}"
)


class Reader(NamedTuple):
    """How a data set's names become captions.

    Attributes:
        text_model: Folder or name of the text model.
        max_tokens: Longest caption.
        samples: Whether the loader leaves names out of a caption that would be too long.
        prompts: What the loader's captions say for some names.
    """

    text_model: str
    max_tokens: int
    samples: bool
    prompts: Mapping[str, str]


def reader_of(model: Mapping[str, Any], dataset: Mapping[str, Any]) -> Optional[Reader]:
    """Finds what reads a data set's names: its pipeline, or else the detector.

    Args:
        model: The model's config.
        dataset: Its config.

    Returns:
        None where no text is read, or where the text model isn't on this machine.
    """
    text = model.get('language_model') or {}
    name, most, samples = text.get('name'), text.get('max_tokens', 256), False
    for step in dataset.get('pipeline') or ():
        if step.get('type') == 'TokenSpans':
            name = step.get('tokenizer_name', name)
            most = step.get('max_tokens', 256)
            samples = step.get('num_negatives') is not None
        elif step.get('type') == 'RandomSamplingNegPos':
            samples = True
    if not isinstance(name, str) or not is_at_hand(name):
        return None
    return Reader(name, most, samples, prompts_of(dataset))


def check_names(
    key: str,
    classes: Sequence[str],
    prompts: Optional[Mapping[str, Mapping[str, str]]],
    reader: Reader,
    trains: bool,
) -> list[Finding]:
    """Finds class names that the model can't read, can't tell apart, or can't be shown at once.

    Args:
        key: Where the data set stands in the config.
        classes: Its class names.
        prompts: Its ``caption_prompt``.
        reader: What makes captions of them.
        trains: Whether it is trained from, with one caption per image.

    Returns:
        Findings: fatal where the caption is too long, and where half of the names or more are the
        same to the model.

    Raises:
        ConfigError: The text model has no vocabulary, or a name to train has nothing to tokenise.
    """
    tokenizer = CaptionTokenizer(reader.text_model, reader.max_tokens)
    names = renamed(prompted(classes, prompts), reader.prompts)
    where = f'{key}.metainfo.classes'
    found = []
    try:
        places = range(len(names)) if trains else readable(tokenizer, names, where)
        classes = [classes[place] for place in places]
        names = tuple(names[place] for place in places)
        lengths = tokenizer.lengths(names)
    except ConfigError as error:
        raise ConfigError(f'{where}: {error}') from error
    total = int(lengths.sum())
    if trains and not reader.samples and total > tokenizer.max_name_tokens:
        found.append(
            Finding(
                f'{where}: a caption of all {len(classes):,} names takes {total + 2:,} tokens, '
                f'more than max_tokens={reader.max_tokens}; let the loader sample the names that '
                "an image lacks: TokenSpans(..., num_negatives='fit') in the pipeline of "
                f'{key}',
                fatal=True,
            )
        )
    short = [place for place, n in enumerate(lengths) if n <= tokenizer.max_name_tokens]
    tokens = [_tokens(tokenizer, names[place]) for place in short]
    kept = [classes[place] for place in short]
    found += _same(where, kept, tokens)
    found += _unknown(where, kept, tokens, tokenizer.tokenizer.unk_token, reader)
    found += _with_dots(where, kept, [names[place] for place in short])
    return found


def check_texts(option: str, text: str, names: Sequence[str]) -> list[Finding]:
    """Finds commas in a text whose names are separated by dots.

    Args:
        option: Of the command line.
        text: As it was typed.
        names: As they were understood.

    Returns:
        A warning: 'a small, red car' may well be meant as one name.
    """
    commas = [name for name in names if ',' in name]
    if not commas:
        return []
    split = ' . '.join(part.strip() for part in text.replace(',', '.').split('.') if part.strip())
    return [
        Finding(
            f"{option} {text!r}: {commas[0]!r} is taken for one name, for ' . ' separates names "
            f'and a comma does not; if several are meant, write "{split}"'
        )
    ]


def _tokens(tokenizer: CaptionTokenizer, name: ClassName) -> tuple[str, ...]:
    caption = tokenizer.join([name])
    ids = caption.input_ids[list(caption.token_spans[0])].tolist()
    return tuple(tokenizer.tokenizer.convert_ids_to_tokens(ids))


def _same(where: str, classes: Sequence[str], tokens: Sequence[tuple[str, ...]]) -> list[Finding]:
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name, read in zip(classes, tokens):
        groups[read].append(name)
    alike = {read: names for read, names in groups.items() if len(names) > 1}
    if not alike:
        return []
    read, names = next(iter(alike.items()))
    count = sum(map(len, alike.values()))
    return [
        Finding(
            f'{where}: {share(count, len(classes), "names")} become the same tokens as another, so '
            f'that the model cannot tell these classes apart; {_RENAME}; first: {some(names)} are '
            f'all read as {" ".join(read)!r}',
            fatal=count >= len(classes) / 2,
        )
    ]


def _unknown(
    where: str,
    classes: Sequence[str],
    tokens: Sequence[tuple[str, ...]],
    unknown: str,
    reader: Reader,
) -> list[Finding]:
    found = []
    unread = [place for place, read in enumerate(tokens) if unknown in read]
    if unread:
        name, read = classes[unread[0]], ' '.join(tokens[unread[0]])
        found.append(
            Finding(
                f'{where}: {share(len(unread), len(classes), "names")} hold words that the '
                f'vocabulary of {reader.text_model} lacks ({unknown}), and say nothing of '
                f'themselves there; {_RENAME}; first: {name!r}, read as {read!r}'
            )
        )
    spelt = [place for place, read in enumerate(tokens) if _is_spelt(read)]
    if spelt:
        name, read = classes[spelt[0]], ' '.join(tokens[spelt[0]])
        found.append(
            Finding(
                f'{where}: {share(len(spelt), len(classes), "names")} hold words that fall into '
                f'single letters with the vocabulary of {reader.text_model}, of which the base '
                f'knows next to nothing; {_RENAME}; first: {name!r}, read as {read!r}'
            )
        )
    return found


def _is_spelt(tokens: Sequence[str]) -> bool:
    """Whether a word of three letters or more has no token of two."""
    words: list[list[str]] = []
    for token in tokens:
        if token.startswith('##') and words:
            words[-1].append(token[2:])
        else:
            words.append([token])
    return any(len(word) > 2 and max(map(len, word)) == 1 for word in words)


def _with_dots(where: str, classes: Sequence[str], names: Sequence[ClassName]) -> list[Finding]:
    prompts = [as_prompt(name) for name in names]
    dotted = [
        name
        for name, prompt in zip(classes, prompts)
        if any(mark in prompt.prefix + prompt.name + prompt.suffix for mark in '.?')
    ]
    if not dotted:
        return []
    return [
        Finding(
            f'{where}: {share(len(dotted), len(classes), "names")} hold a dot or a question mark, '
            'which end a name for the model, so that it reads the parts as if they were names of '
            f'their own; {_RENAME}; first: {dotted[0]!r}'
        )
    ]

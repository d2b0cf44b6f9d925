"""What mmdet's data samples bring to the detector: captions, targets, and boxes in pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from mmdet.structures import SampleList
from torch import Tensor

from mmdet_gdino_lora.errors import ConfigError, NoWordError
from mmdet_gdino_lora.text import CaptionTokenizer, TokenizedCaption, prompted, split_names, spoken
from mmdet_gdino_lora.text.caption import ClassName
from mmdet_gdino_lora.text.readable import readable
from mmdet_gdino_lora.transfer import to_device

#: Who answers for a class: the name of an adapter; None: the base.
Owner = Optional[str]


def caption_of(sample: Any, tokenizer: CaptionTokenizer) -> TokenizedCaption:
    """Returns a sample's one caption, to train from: the loader's, or one made of its classes.

    Args:
        sample: With ``caption_tokens`` (from ``TokenSpans``), or with ``text``: class names (a
            sequence, a dict by label, or names joined by ``' . '``), or a caption together with
            ``tokens_positive``. ``caption_prompt`` says more for some class names.
        tokenizer: The text encoder's.

    Returns:
        The caption.

    Raises:
        ConfigError: The classes take more than one caption, or there are none.
    """
    caption = _written_caption(sample, tokenizer)
    if caption is not None:
        return caption
    try:
        return tokenizer.from_names(*_classes(sample))
    except NoWordError as error:
        raise ConfigError(f'{sample.get("img_path", "an image")}: {error}') from error


def captions_of(
    sample: Any, tokenizer: CaptionTokenizer, chunk_size: int = 0
) -> tuple[TokenizedCaption, ...]:
    """Returns captions that name all of a sample's classes between them, to predict from.

    Args:
        sample: As for :func:`caption_of`.
        tokenizer: The text encoder's.
        chunk_size: Most class names of a caption; 0: as many as fit.

    Returns:
        The captions.

    Raises:
        ConfigError: A sampled caption, which lacks classes; or no classes.
    """
    given = sample.get('caption_tokens')
    if isinstance(given, tuple) and not chunk_size:
        return given
    caption = _written_caption(sample, tokenizer)
    if caption is None or (chunk_size and caption.made_of is not None and not caption.sampled):
        names, labels = _readable_classes(sample, tokenizer)
        return tokenizer.in_chunks(names, labels, chunk_size=chunk_size)
    _check_whole(caption)
    return (caption,)


def captions_by_owner(
    sample: Any,
    tokenizer: CaptionTokenizer,
    owners_of: Callable[[Sequence[ClassName]], Sequence[Owner]],
    chunk_size: int = 0,
) -> dict[Owner, tuple[TokenizedCaption, ...]]:
    """As :func:`captions_of`, where several answer and each for names of its own.

    Args:
        sample: As for :func:`caption_of`.
        tokenizer: The text encoder's.
        owners_of: Says who answers for each class.
        chunk_size: As for :func:`captions_of`.

    Returns:
        By owner the captions of its classes, in the order of its first class. Where one owner has
        all, they are those of :func:`captions_of`.

    Raises:
        ConfigError: As :func:`captions_of`; or somebody wrote the caption, in which names stand
            that can't be taken apart.
    """
    caption = _written_caption(sample, tokenizer)
    if caption is not None:
        _check_whole(caption)
        if caption.made_of is None:
            raise ConfigError(
                f'model.test_cfg.route gives every class name to who was taught it, and the text '
                f'of {sample.get("img_path", "an image")} is a caption ({caption.text[:60]!r}); '
                'give class names, or set model.test_cfg.route=False'
            )
    names, labels = _readable_classes(sample, tokenizer)
    owners = owners_of(names)
    result: dict[Owner, tuple[TokenizedCaption, ...]] = {}
    for owner in dict.fromkeys(owners):
        places = [place for place, other in enumerate(owners) if other == owner]
        own, of_all = [names[place] for place in places], len(places) == len(names)
        own_labels = labels if of_all else [labels[p] if labels else p for p in places]
        result[owner] = tokenizer.in_chunks(own, own_labels, chunk_size=chunk_size)
    return result


def _check_whole(caption: TokenizedCaption) -> None:
    """Sees to it that a caption to predict from has all classes."""
    if caption.sampled:
        raise ConfigError(
            'TokenSpans.num_negatives is set in the test pipeline, so that captions lack classes, '
            'which then could not be detected; remove it there: classes that take more than one '
            'caption are shown in several'
        )


def _written_caption(sample: Any, tokenizer: CaptionTokenizer) -> Optional[TokenizedCaption]:
    """Returns the caption that the loader or somebody wrote; None where class names make it."""
    given = sample.get('caption_tokens')
    if given is None and sample.get('tokens_positive') is not None:
        return tokenizer.from_text(sample.text, sample.tokens_positive, drop_lost=True)
    return given if isinstance(given, TokenizedCaption) else None


def _readable_classes(
    sample: Any, tokenizer: CaptionTokenizer
) -> tuple[Sequence[ClassName], Optional[Sequence[int]]]:
    """As :func:`_classes`, without those whose name has no word in it."""
    names, labels = _classes(sample)
    places = readable(tokenizer, names, sample.get('img_path', ''))
    if len(places) < len(names):
        labels = [place if labels is None else labels[place] for place in places]
        names = [names[place] for place in places]
    return names, labels


def _classes(sample: Any) -> tuple[Sequence[ClassName], Optional[Sequence[int]]]:
    """Returns class names, and their labels where these are not 0, 1, 2, ..."""
    given = sample.get('caption_tokens')
    if given is not None:
        captions = given if isinstance(given, tuple) else (given,)
        made_of = {label: c.made_of[label] for c in captions for label in c.labels}
        names, labels = tuple(made_of.values()), list(made_of)
    else:
        text, labels = sample.text, None
        if isinstance(text, str):
            text = split_names(text)
        elif isinstance(text, Mapping):
            text, labels = list(text.values()), [int(label) for label in text]
        names = prompted(text, sample.get('caption_prompt'))
    if not names:
        raise ConfigError(
            f'the text {sample.text!r} of an image names no class; set return_classes=True of its '
            "data set, or write 'red star . dog'"
        )
    in_order = labels is None or labels == list(range(len(labels)))
    return names, None if in_order else labels


def names_in(captions: Sequence[TokenizedCaption]) -> set[str]:
    """Lists the classes of captions that are made of class names.

    Args:
        captions: Others have none.

    Returns:
        What is said for each, see :func:`~.text.caption.spoken`.
    """
    return {
        spoken(caption.made_of[label])
        for caption in captions
        if caption.made_of is not None
        for label in caption.labels
    }


def is_free_text(sample: Any) -> bool:
    """Tells whether noun phrases have to be found in the caption (mmdet does that with nltk).

    Args:
        sample: As for :func:`caption_of`.
    """
    if 'caption_tokens' in sample or not isinstance(sample.text, str):
        return False
    tokens_positive = sample.get('tokens_positive')
    return tokens_positive == -1 or (
        tokens_positive is None and not sample.get('custom_entities', False)
    )


class TokenTargets:
    """Puts the tokens of every object's class onto the samples.

    Positive maps of whole captions stay on the device for as long as they serve: indexing them by
    label there spares the step a transfer of labels to the host per image.

    Args:
        most_classes: Labels that the denoising queries have embeddings for; None without them.
    """

    def __init__(self, most_classes: Optional[int]) -> None:
        self._most_classes = most_classes
        self._maps: dict[Any, Tensor] = {}

    def attach(
        self, samples: SampleList, captions: Sequence[TokenizedCaption], text_token_mask: Tensor
    ) -> None:
        """Adds ``positive_maps`` [N, T] and ``text_token_mask`` [N, T] to the ground truth.

        Rows of objects whose class the caption lacks, and of labels past all classes, are zero: the
        criterion, which brings labels and spans to the host anyway, refuses them by name.

        Args:
            samples: With ``gt_instances``.
            captions: One per image.
            text_token_mask: True at real tokens [B, T].

        Raises:
            ConfigError: There are more classes than labels.
        """
        for sample, caption, mask in zip(samples, captions, text_token_mask):
            instances = sample.gt_instances
            positive_map = self._class_map(caption, mask.shape[0], mask.device)
            # its last row is that of no class; -1, a padded row, finds it from behind
            labels = instances.labels.clamp(-1, len(positive_map) - 1)
            instances.positive_maps = positive_map[labels]
            instances.text_token_mask = mask[None].expand(len(instances.labels), -1)

    def _class_map(
        self, caption: TokenizedCaption, num_tokens: int, device: torch.device
    ) -> Tensor:
        """Marks the tokens of every class and, in the last row, of none, [classes + 1, T]."""
        spans = caption.token_spans
        key = (caption.text, spans if isinstance(spans, tuple) else None, num_tokens, device)
        if key in self._maps:
            return self._maps[key]
        positive_map = torch.from_numpy(caption.class_map(num_tokens))
        if self._most_classes is not None and len(positive_map) > self._most_classes:
            raise ConfigError(
                f'model.bbox_head.num_classes={self._most_classes} is less than the '
                f'{len(positive_map)} classes of the data, and denoising needs a label for each; '
                f'set it to {len(positive_map)} or more.'
            )
        positive_map = to_device(F.pad(positive_map, (0, 0, 0, 1)), device)
        if isinstance(spans, tuple):  # hardly a sampled caption comes twice
            if len(self._maps) >= 64:
                self._maps.clear()
            self._maps[key] = positive_map
        return positive_map


def with_resized_boxes(samples: SampleList) -> SampleList:
    """Moves ground truth from the original image's pixels to the resized image's.

    mmdet's test pipelines resize first and load annotations afterwards.

    Args:
        samples: With ``gt_instances`` and ``scale_factor``.

    Returns:
        New samples.
    """
    resized = []
    for sample in samples:
        copy = sample.new()
        boxes = sample.gt_instances.bboxes
        copy.gt_instances = sample.gt_instances.clone()
        copy.gt_instances.bboxes = boxes * boxes.new_tensor(sample.scale_factor).repeat(2)
        resized.append(copy)
    return resized

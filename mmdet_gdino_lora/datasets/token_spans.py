"""Class names to caption and token spans, in the loader's workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional, Union

import numpy as np
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS

from mmdet_gdino_lora.checks.findings import tell
from mmdet_gdino_lora.checks.prompts import check_form, check_known
from mmdet_gdino_lora.datasets.boxes import leave_out
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text.cache import Memo
from mmdet_gdino_lora.text.caption import ClassName, prompted, split_names
from mmdet_gdino_lora.text.prompts import renamed
from mmdet_gdino_lora.text.readable import readable
from mmdet_gdino_lora.text.tokenizer import SPECIAL_TOKENS, CaptionTokenizer
from mmdet_gdino_lora.text.tokens import TokenizedCaption

#: Sets of class names remembered. A run has a few; names given with each image may be many.
_VOCABULARIES = 64


@TRANSFORMS.register_module()
class TokenSpans(BaseTransform):
    """Puts class names into one caption and finds the tokens of every class.

    It stands anywhere behind the loading of annotations; ``PackDetInputs`` has to carry ``text``,
    ``tokens_positive`` and ``caption_tokens`` in its ``meta_keys``.

    Required keys:

    - ``text``: class names in the order of their labels (mmdet's datasets with
      ``return_classes=True``); or a dict from label to name (``ODVGDataset`` with a label map); or
      a caption with ``phrases`` (``ODVGDataset`` without) or ``tokens_positive``; or, with
      ``custom_entities``, names joined by ``' . '`` or ``'. '``.
    - ``caption_prompt``: optional, mmdet's: what the caption says for some class names.
    - ``gt_bboxes_labels``: to sample negatives, and to leave out boxes of phrases.

    Changed and added keys:

    - ``text``: the caption.
    - ``tokens_positive``: character spans [[begin, end], ...] per class, mmdet's own format, so
      that its ``GroundingDINO`` trains and predicts from them as well. A list over all classes or,
      where only some are in the caption, a dict by label. Labels stay as they are.
    - ``phrases`` and every per-box annotation (``gt_bboxes``, ``gt_masks``, ...): without phrases
      that the model can't see, see ``on_lost_phrase``.
    - ``caption_tokens``: the same in tokens, :class:`~mmdet_gdino_lora.text.TokenizedCaption`.

    The classes of a test pipeline may take more than one caption: ``caption_tokens`` is then a
    tuple of captions, ``text`` stays as it is, and ``LoRAGroundingDINO`` predicts caption by
    caption. Free text whose phrases nobody marked is left to the detector.

    Args:
        tokenizer_name: Folder or name of the text model, the same as the detector's.
        max_tokens: Longest caption in tokens, [CLS] and [SEP] included, the same as the detector's.
        num_negatives: Classes without an object in the image that the caption names. None: all of
            them, and where they don't fit, training stops with an error. A number: at most that
            many, drawn anew for every image; ``'fit'``: as many as fit. Classes with an object are
            always named. Sampled captions are shuffled. Only for training: a caption that lacks a
            class can't detect it.
        special_tokens: Tokens that end a segment, the same as the detector's.
        prompts: What the caption says for some category names, such as
            ``{'cls_07': 'wheel bolt'}``. The names stay what they are for labels, metrics and
            detections. Training and testing want the same. Where a data set has mmdet's
            ``caption_prompt`` too, its prefix and suffix are kept around these words, and its own
            ``name`` gives way to them.
        on_lost_phrase: What is done with a phrase of a written caption that has no token there (a
            span of white space), or one past ``max_tokens``. ``'drop'`` leaves it out with its
            boxes, and the detector counts such phrases and warns of the first; ``'stop'`` ends the
            run. Boxes of data that is measured by phrase (with ``phrase_ids``) always stay.

    Raises:
        ConfigError: No text model there; or, for an image, classes that don't fit, a class name
            with nothing to tokenise, a label without a class.

    Example:
        >>> train_pipeline = [
        ...     ...,
        ...     dict(type='TokenSpans', tokenizer_name='bert-base-uncased'),
        ...     dict(type='PackDetInputs', meta_keys=(
        ...         'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor', 'flip',
        ...         'flip_direction', 'text', 'tokens_positive', 'caption_tokens')),
        ... ]
    """

    def __init__(
        self,
        tokenizer_name: str,
        max_tokens: int = 256,
        num_negatives: Union[int, str, None] = None,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        prompts: Optional[Mapping[str, str]] = None,
        on_lost_phrase: str = 'drop',
    ) -> None:
        is_number = isinstance(num_negatives, int) and num_negatives >= 0
        if not (num_negatives is None or num_negatives == 'fit' or is_number):
            raise ConfigError(
                f"TokenSpans: num_negatives={num_negatives!r} must be None, a number or 'fit'"
            )
        if on_lost_phrase not in ('drop', 'stop'):
            raise ConfigError(
                f"TokenSpans: on_lost_phrase={on_lost_phrase!r} must be 'drop' or 'stop'"
            )
        tell(check_form('TokenSpans.prompts', {} if prompts is None else prompts))
        self.prompts = dict(prompts or {})
        self.on_lost_phrase = on_lost_phrase
        self.tokenizer_name = tokenizer_name
        self.num_negatives = num_negatives
        self.caption_tokenizer = CaptionTokenizer(tokenizer_name, max_tokens, special_tokens)
        self._vocabularies = Memo(_VOCABULARIES)

    def transform(self, results: dict) -> dict:
        """Adds the caption's keys; the class says which.

        Args:
            results: As mmdet's pipelines pass it on.

        Returns:
            The same dict.
        """
        caption = self._caption(results)
        if isinstance(caption, TokenizedCaption):
            results['text'] = caption.text
            results['tokens_positive'] = caption.tokens_positive
            if caption.lost:
                _leave_out_lost(results, caption)
        if caption is not None:
            results['caption_tokens'] = caption
        return results

    def _caption(
        self, results: dict
    ) -> Union[TokenizedCaption, tuple[TokenizedCaption, ...], None]:
        text = results['text']
        if isinstance(text, str):
            spans = _marked(results)
            if spans is not None:
                return self.caption_tokenizer.from_text(
                    text, spans, drop_lost=self.on_lost_phrase == 'drop'
                )
            if not results.get('custom_entities', False):
                return None
            text = split_names(text)
        # Only a data set's names are all of them; a person may ask for others.
        vocabulary = self._vocabulary(
            text,
            results.get('caption_prompt'),
            is_complete='sample_idx' in results,
            where=results.get('img_path', ''),
        )
        if self.num_negatives is not None:
            return self._sampled(vocabulary, results.get('gt_bboxes_labels', ()))
        names, labels = vocabulary.names, vocabulary.sparse_labels
        if vocabulary.lengths.sum() <= self.caption_tokenizer.max_name_tokens:
            return self.caption_tokenizer.from_names(names, labels)
        return self.caption_tokenizer.in_chunks(names, labels)

    def _vocabulary(
        self,
        text: Union[Sequence[str], Mapping[Any, str]],
        caption_prompt: Optional[Mapping[str, Mapping[str, str]]],
        is_complete: bool,
        where: str,
    ) -> _Vocabulary:
        given = tuple(text.values() if isinstance(text, Mapping) else text)
        said = prompted(given, caption_prompt)
        key = (tuple(text) if isinstance(text, Mapping) else None, said, is_complete)
        vocabulary = self._vocabularies.get(key)
        if vocabulary is None:
            if is_complete:
                tell(check_known('TokenSpans.prompts', self.prompts, given))
            names = renamed(said, self.prompts)
            labels = tuple(range(len(names)) if key[0] is None else map(int, key[0]))
            places = readable(self.caption_tokenizer, names, where)
            names, labels = tuple(names[p] for p in places), tuple(labels[p] for p in places)
            in_order = labels == tuple(range(len(names)))
            lengths = self.caption_tokenizer.lengths(names)
            vocabulary = self._vocabularies.add(
                key,
                _Vocabulary(
                    names,
                    None if in_order else labels,
                    np.array(labels, dtype=np.int64),
                    {label: place for place, label in enumerate(labels)},
                    lengths,
                ),
            )
        return vocabulary

    def _sampled(self, vocabulary: _Vocabulary, gt_labels: Any) -> TokenizedCaption:
        positives = []
        for label in np.unique(np.asarray(gt_labels, dtype=np.int64)).tolist():
            if label not in vocabulary.place:
                raise ConfigError(
                    f'label {label} is not among the {len(vocabulary.names)} class names; the '
                    'annotations and the names (metainfo, label map) have to match'
                )
            positives.append(vocabulary.place[label])
        is_negative = np.ones(len(vocabulary.names), dtype=bool)
        is_negative[positives] = False
        # as all of mmdet's transforms, from the global state that the loader seeds
        permutation = np.random.permutation
        negatives = permutation(np.flatnonzero(is_negative))
        if self.num_negatives != 'fit':
            negatives = negatives[: self.num_negatives]
        left = self.caption_tokenizer.max_name_tokens - vocabulary.lengths[positives].sum()
        fitting = np.searchsorted(vocabulary.lengths[negatives].cumsum(), left, side='right')
        chosen = permutation(
            np.concatenate([np.array(positives, dtype=np.int64), negatives[:fitting]])
        )
        # not through the memo: hardly a sampled caption comes twice
        return self.caption_tokenizer.join(
            [vocabulary.names[place] for place in chosen.tolist()],
            vocabulary.labels[chosen].tolist(),
            sampled=True,
        )

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(tokenizer_name={self.tokenizer_name!r}, '
            f'max_tokens={self.caption_tokenizer.max_tokens}, '
            f'num_negatives={self.num_negatives!r}, prompts={self.prompts!r}, '
            f'on_lost_phrase={self.on_lost_phrase!r})'
        )


def _marked(results: dict) -> Union[Sequence, Mapping[int, Sequence], None]:
    """Returns the characters of the phrases that somebody marked in a caption, by label."""
    phrases = results.get('phrases')
    if isinstance(phrases, Mapping) and phrases:
        spans = {label: phrase['tokens_positive'] for label, phrase in phrases.items()}
        return list(spans.values()) if list(spans) == list(range(len(spans))) else spans
    spans = results.get('tokens_positive', -1)
    return None if spans == -1 else spans


def _leave_out_lost(results: dict, caption: TokenizedCaption) -> None:
    if 'phrase_ids' in results:  # labels are no phrases, and a metric counts what was missed
        return
    if isinstance(results.get('phrases'), Mapping):
        kept = {k: v for k, v in results['phrases'].items() if int(k) not in caption.lost}
        results['phrases'] = kept
    leave_out(results, caption.lost)


class _Vocabulary(NamedTuple):
    """The class names of a dataset, and how many tokens each takes in a caption."""

    names: tuple[ClassName, ...]
    sparse_labels: Optional[tuple[int, ...]]  # None: 0, 1, 2, ...
    labels: np.ndarray
    place: dict[int, int]  # of a label among the names
    lengths: np.ndarray

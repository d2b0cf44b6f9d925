"""What a pipeline makes of an image: pixels, boxes, and the tokens of every class."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import mmcv
import numpy as np
from mmdet.registry import DATASETS
from mmdet.structures.bbox import BaseBoxes

from mmdet_gdino_lora.datasets import TokenSpans
from mmdet_gdino_lora.engine.runner_config import annotations_follow_resize
from mmdet_gdino_lora.engine.unreadable import can_be_read
from mmdet_gdino_lora.engine.visits import seed_by
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.samples import caption_of, captions_of, is_free_text
from mmdet_gdino_lora.text import CaptionTokenizer, TokenizedCaption

#: What mmcv's Normalize notes down of itself.
_NORMALISED = 'img_norm_cfg'


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a caption.

    Attributes:
        text: As the tokenizer cut it, such as ``##bolt``.
        labels: Of the classes that it stands for; empty for a separator.
    """

    text: str
    labels: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class View:
    """An image as the model is shown it.

    Attributes:
        path: Of its file.
        image: uint8 [H, W, 3], RGB.
        boxes: [N, 4] (x1, y1, x2, y2) in its pixels.
        labels: Their classes, [N].
        ignored: Which of them nothing is learned from (crowds), [N] bool.
        names: Of the classes in the captions, by label.
        captions: Its captions; in training one.
    """

    path: str
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    ignored: np.ndarray
    names: Mapping[int, str]
    captions: tuple[tuple[Token, ...], ...]


class Views:
    """A config's data set, as the runner builds it, to be looked at.

    Args:
        cfg: The config.
        split: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        ConfigError: The config has no such data set.
    """

    def __init__(self, cfg: Mapping[str, Any], split: str) -> None:
        loader = cfg.get(f'{split}_dataloader')
        if not loader:
            raise ConfigError(f'{split}_dataloader is not set, so that there is nothing to look at')
        self._split = split
        self._key = f'{split}_dataloader.dataset'
        self._dataset = DATASETS.build(loader['dataset'])
        if hasattr(self._dataset, 'full_init'):  # as mmengine's runner does
            self._dataset.full_init()
        # The detector, too, moves boxes that were loaded behind the resizing.
        resized_first = annotations_follow_resize({'val_dataloader': loader})
        self._late_boxes = split != 'train' and resized_first
        self._model = cfg.get('model') or {}
        for part in _parts(self._dataset):
            if hasattr(part, 'meta_keys'):
                part.meta_keys = (*part.meta_keys, _NORMALISED)

    def __len__(self) -> int:
        return len(self._dataset)

    def view(self, index: int, seed: int, draw: int = 0) -> View:
        """Shows an image as one visit of training would.

        Args:
            index: Of the image.
            seed: What is drawn depends on it, on the index, and on the next:
            draw: Number of the visit.

        Returns:
            The view.

        Raises:
            ConfigError: The image can't be read, the pipeline doesn't end as mmdet's do, or its
                names are no caption.
        """
        seed_by(seed, index, draw)
        try:
            packed = self._dataset[index]
        except Exception as error:
            raise self._told(index, error) from error
        if not (isinstance(packed, Mapping) and {'inputs', 'data_samples'} <= set(packed)):
            raise ConfigError(
                f'{self._key}.pipeline does not end in PackDetInputs, whose image and boxes would '
                'be shown; let it end as the shipped configs do'
            )
        sample = packed['data_samples']
        scale = np.tile(sample.scale_factor, 2) if self._late_boxes else np.ones(4)
        captions = self._captions(sample)
        names = {label: str(c.names[label]) for c in captions for label in c.labels}
        tokens = tuple(tuple(self._tokens(caption)) for caption in captions)
        path = str(sample.get('img_path', ''))
        return View(path, _pixels(packed), *_boxes(sample, scale), names=names, captions=tokens)

    def _told(self, index: int, error: Exception) -> Exception:
        """One sentence about an image that can't be read; any other error is its author's."""
        path = self._dataset.get_data_info(index).get('img_path')
        if isinstance(error, ConfigError) or not path or can_be_read(path):
            return error
        return ConfigError(
            f'{self._key}: the image {path!r} can not be read; `gdino-lora check-dataset` lists '
            'all such images'
        )

    @functools.cached_property
    def _tokenizer(self) -> CaptionTokenizer:
        for part in _parts(self._dataset):
            if isinstance(part, TokenSpans):
                return part.caption_tokenizer
        text = self._model.get('language_model') or {}
        if not text.get('name'):
            raise ConfigError(
                f'{self._key}.pipeline has no TokenSpans and model.language_model no name, so that '
                'nothing says how captions are cut into tokens; add TokenSpans to the pipeline'
            )
        return CaptionTokenizer(text['name'], text.get('max_tokens', 256))

    def _captions(self, sample: Any) -> tuple[TokenizedCaption, ...]:
        """TokenSpans' own; where a pipeline lacks it, what the detector makes of the sample."""
        if is_free_text(sample):
            return (self._tokenizer.from_plain_text(sample.text),)
        if self._split == 'train':
            return (caption_of(sample, self._tokenizer),)
        return captions_of(sample, self._tokenizer)

    def _tokens(self, caption: TokenizedCaption) -> Iterator[Token]:
        labels: list[list[int]] = [[] for _ in caption.input_ids]
        for label in caption.labels:
            for place in caption.token_spans[label]:
                labels[place].append(label)
        texts = self._tokenizer.tokenizer.convert_ids_to_tokens(caption.input_ids.tolist())
        return (Token(text, tuple(of)) for text, of in zip(texts, labels))


def _parts(part: Any) -> Iterator[Any]:
    """A data set, those that it wraps, and every transform of theirs, however deep."""
    yield part
    for name in ('dataset', 'datasets', 'pipeline', 'transforms'):
        inner: Optional[Any] = getattr(part, name, None)
        for one in inner if isinstance(inner, (list, tuple)) else [inner]:
            if one is not None:
                yield from _parts(one)


def _pixels(packed: Mapping[str, Any]) -> np.ndarray:
    """The image as it can be looked at, RGB."""
    image = packed['inputs'].permute(1, 2, 0).float().numpy()
    normalised = packed['data_samples'].get(_NORMALISED)
    if normalised:
        mean, std = (np.asarray(normalised[key], dtype=np.float64) for key in ('mean', 'std'))
        image = mmcv.imdenormalize(image, mean, std, to_bgr=normalised['to_rgb'])
    image = image.round().clip(0, 255).astype(np.uint8)
    return np.ascontiguousarray(image[..., ::-1] if image.shape[2] == 3 else image.repeat(3, 2))


def _boxes(sample: Any, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes times a scale, labels, and which boxes are ignored."""
    boxes, labels, ignored = [np.zeros((0, 4))], [np.zeros(0, dtype=int)], [np.zeros(0, dtype=bool)]
    for name in ('gt_instances', 'ignored_instances'):
        instances = sample.get(name)
        if instances is None or 'bboxes' not in instances:
            continue
        given = instances.bboxes
        corners = (given.tensor if isinstance(given, BaseBoxes) else given).numpy()
        boxes.append(corners.reshape(-1, 4) * scale)
        labels.append(instances.labels.numpy().astype(int))
        ignored.append(np.full(len(corners), name == 'ignored_instances'))
    return np.concatenate(boxes), np.concatenate(labels), np.concatenate(ignored)

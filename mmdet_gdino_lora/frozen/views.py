"""A training pipeline whose views of an image are drawn once, and read from disk from then on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Optional

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.dataset import Compose
from mmengine.structures import InstanceData

from mmdet_gdino_lora.engine.replay import KEPT_VIEW
from mmdet_gdino_lora.engine.visits import same_numbers_drawn, seed_by
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.frozen.store import Entry, entry_path, read

MISSING = 'missing_view'
"""Meta information of a sample whose view is not kept yet: where it belongs."""

OF_THE_CAPTION = (
    'text',
    'tokens_positive',
    'caption_tokens',
    'caption_prompt',
    'custom_entities',
    'phrases',
)
"""Meta information that all images of a data set share, because their caption is fixed."""


class ViewPipeline(Compose):
    """A data set's pipeline, of which every image has a fixed number of outcomes.

    Which of an image's views a visit gets is drawn from numpy's generator, as all of mmcv's
    transforms draw. What the view itself looks like depends on the image's path and the view's
    number alone, so that runs of any seed share what is kept.

    A sample whose view is kept has the view in place of its image, of which a single pixel is left.

    Args:
        pipeline: The data set's own.
        views: Of every image.
        folder: Where they are kept.
        recipe: Says what else features depend on, see :mod:`~.frozen.recipe`.
        caption: What the samples' meta information says of the caption.
    """

    def __init__(
        self, pipeline: Compose, *, views: int, folder: str, recipe: str, caption: Mapping[str, Any]
    ) -> None:
        super().__init__(pipeline.transforms)
        self._views, self._folder, self._recipe = views, folder, recipe
        self._caption = dict(caption)

    def __call__(self, data: dict) -> Optional[dict]:
        """Makes the sample of a view that is drawn.

        Args:
            data: Of one image, as the data set describes it.

        Returns:
            The packed sample; None where the pipeline has none of this view.

        Raises:
            ConfigError: The image's caption is another one than the data set's.
        """
        number = int(np.random.randint(self._views))  # noqa: NPY002 - the generator of a visit
        image = data.get('img_path', '')
        path = entry_path(self._folder, self._recipe, image, self._caption['text'], number)
        stamp = stamp_of(data)
        kept = read(Entry(path, stamp)) if stamp else None
        if kept is None:
            with own_randomness(image, number):
                packed = super().__call__(data)
            if packed is None:
                return None
            sample = packed['data_samples']
            check_caption(sample, self._caption)
            if stamp:
                sample.set_metainfo({MISSING: Entry(path, stamp, os.path.exists(path))})
            return packed
        view, truth = kept
        sample = DetDataSample(metainfo={**truth.metainfo, **self._caption})
        sample.gt_instances = InstanceData(bboxes=truth.bboxes, labels=truth.labels)
        sample.set_field(view, KEPT_VIEW)
        return dict(inputs=torch.zeros(3, 1, 1, dtype=torch.uint8), data_samples=sample)


def stamp_of(data: Mapping[str, Any]) -> str:
    """Says which image with which annotations a view is of.

    Args:
        data: Of one image, as the data set describes it.

    Returns:
        A digest of the annotations and of the file's size and time; empty where there is no such
        file, which the pipeline will tell.
    """
    image = data.get('img_path', '')
    try:
        # Other file systems than this machine's are not asked: they have no such time.
        status = None if '://' in image else os.stat(image)
    except OSError:
        return ''
    file = (status.st_size, status.st_mtime_ns) if status else ()
    annotations = json.dumps(data.get('instances', ()), default=str)
    return hashlib.blake2b(f'{file} {annotations}'.encode(), digest_size=16).hexdigest()


@contextmanager
def own_randomness(image: str, number: int) -> Iterator[None]:
    """Within, random numbers depend on an image's path and the number of a view alone.

    Args:
        image: The path.
        number: Of the view.

    Yields:
        Nothing; behind it everybody's generators are as they were.
    """
    digest = hashlib.blake2b(f'{number} {image}'.encode(), digest_size=8).digest()
    with same_numbers_drawn():
        seed_by(int.from_bytes(digest, 'big'))
        yield


def caption_of_set(sample: Any) -> dict[str, Any]:
    """Reads what a sample says of its caption.

    Args:
        sample: As the pipeline packed it.

    Returns:
        Meta information that all samples of the data set share.

    Raises:
        ConfigError: The caption is drawn anew for every image.
    """
    said = {key: sample.metainfo[key] for key in OF_THE_CAPTION if key in sample.metainfo}
    if getattr(said.get('caption_tokens'), 'sampled', False):
        raise ConfigError(
            'FrozenFeaturesHook keeps features of one caption, and TokenSpans.num_negatives draws '
            'the names of each; leave num_negatives or the hook out'
        )
    said.setdefault('text', None)
    return said


def check_caption(sample: Any, caption: Mapping[str, Any]) -> None:
    """Sees to it that a sample has its data set's caption.

    Args:
        sample: As the pipeline packed it.
        caption: Of :func:`caption_of_set`.

    Raises:
        ConfigError: It has another one.
    """
    text = sample.metainfo.get('text')
    if text != caption['text']:
        raise ConfigError(
            'FrozenFeaturesHook keeps features of one caption, and the captions of these images '
            f'differ ({_short(text)} of {sample.metainfo.get("img_path", "an image")}, '
            f'{_short(caption["text"])} of another): sampled names, ODVG or written captions; '
            'leave the hook out, or name all classes for every image'
        )


def _short(text: Any) -> str:
    said = repr(text)
    return said if len(said) <= 60 else f'{said[:57]}...'

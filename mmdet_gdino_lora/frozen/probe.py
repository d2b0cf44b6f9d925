"""A look at a few images of a data set: which caption have they, how large are their features?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from mmengine.dataset import BaseDataset

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.frozen.encode import encode
from mmdet_gdino_lora.frozen.views import (
    caption_of_set,
    check_caption,
    own_randomness,
    stamp_of,
)
from mmdet_gdino_lora.lora import evaluating
from mmdet_gdino_lora.text import TokenizedCaption

IMAGES = 8
"""Images of a data set that are looked at."""


class Probe(NamedTuple):
    """What is known of a data set.

    Attributes:
        said: What its samples say of the caption, the same for all.
        captions: That its images are encoded under.
        values: Numbers in the features of a view, on average.
    """

    said: Mapping[str, Any]
    captions: tuple[TokenizedCaption, ...]
    values: float


def probe(detector: Any, dataset: BaseDataset, asked: Optional[TokenizedCaption]) -> Probe:
    """Looks at a data set.

    Args:
        detector: Encodes one image.
        dataset: With its own pipeline.
        asked: As for :class:`~.frozen.encode.FrozenFeatures`.

    Returns:
        What was found.

    Raises:
        ConfigError: Captions differ, or there is no image.
    """
    packed = []
    for index in np.linspace(0, len(dataset) - 1, min(IMAGES, len(dataset))).astype(int).tolist():
        data = dataset.get_data_info(index)
        if not stamp_of(data):
            raise ConfigError(
                f'FrozenFeaturesHook looks whether images have changed, and '
                f'{data.get("img_path")!r} is no file that can be read here; put it back, unpack '
                'the images, or leave the hook out'
            )
        with own_randomness(data.get('img_path', ''), 0):
            packed.append(dataset.pipeline(data))
    packed = [made for made in packed if made is not None]
    if not packed:
        raise ConfigError(
            'FrozenFeaturesHook: the pipeline of the training data makes nothing of the images '
            'that were looked at; check train_dataloader.dataset'
        )
    first = packed[0]
    said = caption_of_set(first['data_samples'])
    for made in packed:
        check_caption(made['data_samples'], said)
    sample = first['data_samples']
    own = detector.captions([sample])[0]
    captions = (own,) if asked is None else (own, asked)
    batch = detector.data_preprocessor(dict(inputs=[first['inputs']], data_samples=[sample]), True)
    with torch.no_grad(), evaluating(detector):
        (view,) = encode(detector, batch['inputs'], sample.img_shape[:2], [[c] for c in captions])
    areas = [int(np.prod(made['data_samples'].img_shape[:2])) for made in packed]
    values = sum(tensor.numel() for encoding in view.encodings for tensor in encoding)
    return Probe(said, captions, values * float(np.mean(areas)) / areas[0])

"""A batch that something went wrong with, as a file: what is needed to go through it again.

The file holds tensors and plain values alone, so that it is read with ``weights_only=True``.
``tools/replay.py`` does that.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_gdino_lora.engine.atomic import atomic
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text.tokens import CharSpans, TokenizedCaption

FORMAT = 'mmdet-gdino-lora replay 1'

KEPT_VIEW = 'kept_view'
"""Field of a sample that has its features in place of its image (``frozen/``)."""


@dataclasses.dataclass
class Replay:
    """A training step.

    Attributes:
        batch: ``inputs`` and ``data_samples``, as the loader handed them over.
        weights: What was trained, before the step.
        moment: ``seed``, ``rank`` and ``iteration``.
        told: What was found.
    """

    batch: dict[str, Any]
    weights: Mapping[str, Tensor]
    moment: Mapping[str, int]
    told: str

    def write(self, path: str) -> None:
        """Writes the file, whole or not at all.

        Args:
            path: Its name.
        """
        content = dict(
            format=FORMAT,
            inputs=[image.detach().cpu() for image in self.batch['inputs']],
            samples=[_described(sample) for sample in self.batch['data_samples']],
            weights={name: tensor.detach().cpu() for name, tensor in self.weights.items()},
            moment=dict(self.moment),
            told=self.told,
        )
        with atomic(path) as partial:
            torch.save(content, partial)

    @classmethod
    def read(cls, path: str) -> Replay:
        """Reads a file.

        Args:
            path: Its name.

        Returns:
            The step.

        Raises:
            ConfigError: It isn't there, or is something else.
        """
        if not os.path.isfile(path):
            raise ConfigError(f'{path}: no such file; give a replay file, nonfinite_iter_....pth')
        try:
            content = torch.load(path, map_location='cpu', weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
            raise ConfigError(f'{path} can not be read as a replay file: {error}') from error
        if not isinstance(content, dict) or content.get('format') != FORMAT:
            raise ConfigError(f'{path} is no replay file ({FORMAT!r}); give nonfinite_iter_....pth')
        batch = dict(inputs=content['inputs'], data_samples=list(map(_sample, content['samples'])))
        return cls(batch, content['weights'], content['moment'], content['told'])


def has_images(batch: Any) -> bool:
    """Tells whether a batch can be gone through again from its images.

    Args:
        batch: As the loader hands it over.

    Returns:
        False where features stand in place of some image, or it is no batch of mmdet's.
    """
    if not isinstance(batch, Mapping):
        return False
    return not any(KEPT_VIEW in sample for sample in batch['data_samples'])


def paths_of(batch: Any) -> list[str]:
    """Names the images of a batch.

    Args:
        batch: As the loader hands it over.

    Returns:
        Their paths; of an image without one its number in the data set, or in the batch.
    """
    samples = batch.get('data_samples') if isinstance(batch, Mapping) else None
    names = []
    for number, sample in enumerate(samples or ()):
        metainfo = sample.metainfo
        named = metainfo.get('img_path') or f'image {metainfo.get("img_id", number)}'
        names.append(str(named))
    return names


def _described(sample: Any) -> dict[str, Any]:
    truth = sample.gt_instances
    metainfo = {
        name: _captioned(value) if isinstance(value, TokenizedCaption) else _plain(value)
        for name, value in sample.metainfo.items()
    }
    boxes = getattr(truth.bboxes, 'tensor', truth.bboxes)
    return dict(metainfo=metainfo, bboxes=boxes.detach().cpu(), labels=truth.labels.cpu())


def _captioned(caption: TokenizedCaption) -> dict[str, Any]:
    fields = {f.name: getattr(caption, f.name) for f in dataclasses.fields(caption)}
    return dict(caption=_plain(fields))


def _plain(value: Any) -> Any:
    """The value in builtin types and tensors; of what is neither, its text."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, np.ndarray) and value.dtype.kind in 'biuf':
        return torch.from_numpy(np.array(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (
            [_plain(item) for item in value]
            if isinstance(value, list)
            else tuple(_plain(item) for item in value)
        )
    return str(value)


def _sample(described: Mapping[str, Any]) -> DetDataSample:
    metainfo = {
        name: _caption(value['caption'])
        if isinstance(value, dict) and set(value) == {'caption'}
        else value
        for name, value in described['metainfo'].items()
    }
    sample = DetDataSample(metainfo=metainfo)
    sample.gt_instances = InstanceData(bboxes=described['bboxes'], labels=described['labels'])
    return sample


def _caption(fields: Mapping[str, Any]) -> TokenizedCaption:
    arrays: dict[str, Any] = {
        name: v.numpy() if isinstance(v, Tensor) else v for name, v in fields.items()
    }
    spans = arrays['tokens_positive']
    if isinstance(spans, list):
        arrays['tokens_positive'] = CharSpans(spans)
    return TokenizedCaption(**arrays)

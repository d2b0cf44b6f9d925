"""The smallest model that goes every way: retain, sampled captions, denoising, validation."""

from __future__ import annotations

import copy
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config

from mmdet_gdino_lora import TokenSpans
from tests.builders import SMALL_DECODER, SMALL_ENCODER
from tests.run_small import RandomImages, config

SIZE = 32


@DATASETS.register_module(force=True)
class SampledImages(RandomImages):
    """Small random images whose captions name their classes and a draw of the others.

    Args:
        text_dir: Of the text model.
        num_negatives: As for ``TokenSpans``; None names all classes.
        flicker: As for ``RandomImages``.
    """

    def __init__(self, text_dir: str, num_negatives: Any = 1, flicker: int = 55) -> None:
        super().__init__(flicker)
        self._spans = TokenSpans(tokenizer_name=text_dir, num_negatives=num_negatives)

    def __getitem__(self, index: int) -> dict[str, Any]:
        made = super().__getitem__(index)
        sample = made['data_samples']
        labels = sample.gt_instances.labels.numpy()
        found = self._spans.transform(dict(text=sample.text, gt_bboxes_labels=labels))
        sample.set_metainfo(dict(caption_tokens=found['caption_tokens'], img_path=f'{index}.jpg'))
        return dict(made, inputs=made['inputs'][:, :SIZE, :SIZE])


def smallest(work_dir: str, text_dir: str, base: str, **settings: Any) -> Config:
    """Describes a run, as :func:`tests.run_small.config` does.

    Args:
        work_dir: Of the run.
        text_dir: Of the text model.
        base: Base checkpoint, of :func:`model`.
        **settings: Further ones of ``tests.run_small.config``.

    Returns:
        The run's config.
    """
    retain = settings.pop('retain', dict(names=['bird', 'car'], every=2))
    cfg = config(work_dir, text_dir, base, retain=retain, **model(), **settings)
    cfg.train_dataloader.dataset = dict(type='SampledImages', text_dir=text_dir)
    if cfg.get('val_dataloader'):
        cfg.val_dataloader.dataset = dict(
            type='SampledImages', text_dir=text_dir, num_negatives=None, flicker=1
        )
    return cfg


def model() -> dict[str, Any]:
    """Keys of the model config that make it small."""
    encoder, decoder = copy.deepcopy(SMALL_ENCODER), copy.deepcopy(SMALL_DECODER)
    encoder['num_layers'], decoder['num_layers'] = 1, 2
    denoising = dict(group_cfg=dict(dynamic=True, num_groups=None, num_dn_queries=4))
    return dict(
        num_queries=8,
        encoder=encoder,
        decoder=decoder,
        dn_cfg=dict(label_noise_scale=0.5, box_noise_scale=1.0, **denoising),
        test_cfg=dict(max_per_img=8),
    )

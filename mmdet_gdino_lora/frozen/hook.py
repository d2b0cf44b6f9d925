"""The hook that has frozen features kept: one key of a config, whoever starts the run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Optional

import torch
from mmdet.registry import HOOKS
from mmengine.dataset import BaseDataset, ClassBalancedDataset, ConcatDataset, RepeatDataset
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook

from mmdet_gdino_lora.engine.wrapped import detector_of
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.frozen.encode import FrozenFeatures
from mmdet_gdino_lora.frozen.probe import Probe, probe
from mmdet_gdino_lora.frozen.recipe import digest_of, recipe_of, take_over
from mmdet_gdino_lora.frozen.space import check_space, remove_unfinished
from mmdet_gdino_lora.frozen.views import ViewPipeline
from mmdet_gdino_lora.lora import lora_state
from mmdet_gdino_lora.retain import BEHIND_ENCODER
from mmdet_gdino_lora.text import TokenizedCaption

DTYPES = dict(bfloat16=torch.bfloat16, float32=torch.float32)


@HOOKS.register_module()
class FrozenFeaturesHook(Hook):
    """Keeps what the frozen image tower and encoder make of the training images.

    With adapters behind the encoder alone (preset ``decoder``) and a fixed caption, the encoder's
    outputs depend on nothing but the augmented image. Here every image has a fixed number of
    augmented views; the first time that one is drawn its features are computed and written, and
    from then on they are read: a step costs decoder and losses alone. Validation is not kept.

    Example::

        default_hooks = dict(frozen_features=dict(type='FrozenFeaturesHook', views=8))

    Args:
        views: Of every image; each visit of an image draws one of them.
        folder: Where features are kept; runs that differ behind the encoder alone (learning rate,
            rank, losses, seed) can share it. None: ``frozen_features`` in the run's folder.
        dtype: That features are kept in, ``'bfloat16'`` or ``'float32'``.

    Raises:
        ConfigError: A value that can't be.
    """

    priority = 'HIGHEST'  # before ResumableSeedHook builds the loader anew

    def __init__(
        self, views: int = 8, folder: Optional[str] = None, dtype: str = 'bfloat16'
    ) -> None:
        if isinstance(views, bool) or not isinstance(views, int) or views < 1:
            raise ConfigError(f'FrozenFeaturesHook.views={views!r} is no whole number above 0')
        if dtype not in DTYPES:
            raise ConfigError(
                f'FrozenFeaturesHook.dtype={dtype!r} is not one of {", ".join(DTYPES)}'
            )
        self._views, self._folder, self._dtype = views, folder, dtype
        self._features: Optional[FrozenFeatures] = None

    def before_train(self, runner: Any) -> None:
        """Checks that features can be kept, and has the data sets and the detector do so.

        Args:
            runner: mmengine's runner.

        Raises:
            ConfigError: Something in front of the decoder is trained, captions aren't fixed, images
                are mixed, or the disk is too small.
        """
        detector, loop = detector_of(runner), runner.train_loop
        asked = check_model(detector)
        datasets = list(leaves(loop.dataloader.dataset))
        probes = [probe(detector, dataset, asked) for dataset in datasets]
        captions = [caption for p in probes for caption in p.captions]
        recipe = recipe_of(detector, runner.cfg, captions, self._dtype)
        folder = self._folder or os.path.join(runner.work_dir, 'frozen_features')
        if get_rank() == 0:
            take_over(folder, recipe)
            remove_unfinished(folder)
        told = check_space(folder, *self._needed(loop, datasets, probes), self._views)
        runner.logger.info('Frozen %s', told)
        for dataset, found in zip(datasets, probes):
            dataset.pipeline = ViewPipeline(
                dataset.pipeline,
                views=self._views,
                folder=folder,
                recipe=digest_of(recipe),
                caption=found.said,
            )
        if hasattr(loop, 'dataloader_iterator'):
            # A loop that counts iterations: its workers have the data sets as they were.
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)
        self._features = FrozenFeatures(DTYPES[self._dtype], asked, runner.work_dir)
        detector.frozen_features = self._features

    def after_train(self, runner: Any) -> None:
        """Waits for the disk, and has the detector compute again.

        Args:
            runner: mmengine's runner.
        """
        if self._features is not None:
            self._features.settle()
            detector_of(runner).frozen_features = self._features = None

    def _needed(
        self, loop: Any, datasets: Sequence[BaseDataset], probes: Sequence[Probe]
    ) -> tuple[int, float]:
        """Files that there will be at most, and the bytes of one."""
        images = sum(map(len, datasets))
        size = DTYPES[self._dtype].itemsize
        values = sum(len(d) * p.values for d, p in zip(datasets, probes)) / max(1, images)
        batch = getattr(loop.dataloader.batch_sampler, 'batch_size', None) or 1
        visits = math.ceil(loop.max_iters * batch * get_world_size())
        return min(images * self._views, visits), values * size


def check_model(detector: Any) -> Optional[TokenizedCaption]:
    """Checks that the encoder's outputs are the same in every step.

    Args:
        detector: Of the run.

    Returns:
        The caption that ``retain`` shows the images under, if there is one.

    Raises:
        ConfigError: They aren't.
    """
    injection = lora_state(detector).injection if hasattr(detector, 'frozen_features') else None
    if injection is None:
        raise ConfigError(
            'FrozenFeaturesHook keeps what a frozen encoder makes of images, and this model has no '
            "adapters, so that all of it is trained; set model.type='LoRAGroundingDINO' and "
            'model.lora, or leave the hook out'
        )
    changing = injection.trained | injection.buffers
    parts = sorted({name.partition('.')[0] for name in changing} - BEHIND_ENCODER)
    if parts:
        raise ConfigError(
            f'FrozenFeaturesHook keeps what a frozen encoder makes of images, and '
            f'{", ".join(parts)} in front of the decoder would be trained; set '
            "model.lora.preset='decoder' and nothing of them in model.trainable, or leave the hook "
            'out'
        )
    if getattr(detector.data_preprocessor, 'batch_augments', None) is not None:
        raise ConfigError(
            'model.data_preprocessor.batch_augments changes images behind the loader, and '
            'FrozenFeaturesHook would not see it; leave one of the two out'
        )
    if detector.retention is None:
        return None
    caption = detector.retention.fixed_caption
    if caption is None:
        raise ConfigError(
            'model.retain.names take more than one caption, so that each step draws some, and '
            'FrozenFeaturesHook keeps features of one; name fewer, or leave the hook out'
        )
    return caption


def leaves(dataset: Any) -> Iterator[BaseDataset]:
    """Finds the data sets whose pipelines make samples of single images.

    Args:
        dataset: The loader's.

    Yields:
        Each.

    Raises:
        ConfigError: A data set of another kind, one that mixes images among them.
    """
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from leaves(part)
    elif isinstance(dataset, (RepeatDataset, ClassBalancedDataset)):
        yield from leaves(dataset.dataset)
    elif isinstance(dataset, BaseDataset):
        yield dataset
    else:
        raise ConfigError(
            f'train_dataloader.dataset has a {type(dataset).__name__}, which mixes images or makes '
            'them elsewhere than in a pipeline; FrozenFeaturesHook needs data sets of mmdet, which '
            'may stand in ConcatDataset, RepeatDataset or ClassBalancedDataset; change that, or '
            'leave the hook out'
        )

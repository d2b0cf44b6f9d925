"""Goes through a folder's photos with a detector, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Callable, Union

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from mmdet_gdino_lora.labelling.detections import Found, found_in
from mmdet_gdino_lora.labelling.kept import Kept
from mmdet_gdino_lora.labelling.photos import LoadedBatches, Photo


def go_through(
    detector: Any,
    pipeline: Callable[[dict], Any],
    folder: str,
    photos: Sequence[Photo],
    names: Sequence[str],
    kept: Kept,
    size: int,
    workers: int,
    lowest: float,
) -> dict[str, Found]:
    """Detects the classes in every photo that isn't known yet.

    Args:
        detector: In eval mode.
        pipeline: The config's, for one image.
        folder: Where the photos are.
        photos: In it.
        names: Class names.
        kept: What is known; what is found is added to it.
        size: Photos of a batch.
        workers: Processes that load them.
        lowest: Score below which nothing is kept.

    Returns:
        What was found in each photo, by name, in their order.
    """
    batches = [photos[begin : begin + size] for begin in range(0, len(photos), size)]
    left = [batch for batch in batches if kept.of(batch) is None]
    known = len(photos) - sum(map(len, left))
    with tqdm(total=len(photos), initial=known, unit='photo', desc='labelling') as bar:
        for batch, new in zip(
            left, detected(detector, pipeline, folder, left, names, workers, lowest)
        ):
            kept.add(batch, new)
            bar.update(len(batch))
    found: dict[str, Found] = {}
    for batch in batches:
        found.update(zip((photo.name for photo in batch), kept.of(batch) or ()))
    return found


def detected(
    detector: Any,
    pipeline: Callable[[dict], Any],
    folder: str,
    batches: Sequence[Sequence[Photo]],
    names: Sequence[str],
    workers: int,
    lowest: float,
) -> Iterator[list[Found]]:
    """Detects the classes in photos, as they come.

    Args:
        detector: In eval mode.
        pipeline: The config's, for one image.
        folder: Where the photos are.
        batches: Of photos in it.
        names: Class names.
        workers: Processes that load them.
        lowest: Score below which nothing is kept.

    Yields:
        For each batch, what was found in each of its photos.
    """
    loader = DataLoader(
        LoadedBatches(folder, batches, pipeline, names),
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
    )
    for loaded in loader:
        yield _detect(detector, loaded, lowest)


def _as_it_is(batch: Any) -> Any:
    return batch


def _detect(detector: Any, loaded: Sequence[Union[dict, str]], lowest: float) -> list[Found]:
    samples = [sample for sample in loaded if not isinstance(sample, str)]
    predicted: Iterator[Any] = iter(())
    if samples:
        batch = {key: [sample[key] for sample in samples] for key in ('inputs', 'data_samples')}
        with torch.no_grad():
            predicted = iter(detector.test_step(batch))
    found = []
    for sample in loaded:
        if isinstance(sample, str):
            found.append(Found(unreadable=sample))
        else:
            result = next(predicted)
            height, width = result.ori_shape[:2]
            found.append(found_in(result.pred_instances, height, width, lowest))
    return found

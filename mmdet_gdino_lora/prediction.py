"""What the detector does outside training: detections, and validation losses behind them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from mmdet.structures import SampleList
from mmengine.logging import print_log
from mmengine.structures import BaseDataElement, InstanceData
from torch import Tensor

from mmdet_gdino_lora.engine.runner_config import annotations_follow_resize, runner_config
from mmdet_gdino_lora.phrases import without_lost
from mmdet_gdino_lora.route import answering, shares_image_tower
from mmdet_gdino_lora.samples import Owner, captions_by_owner, captions_of, with_resized_boxes
from mmdet_gdino_lora.text import TokenizedCaption
from mmdet_gdino_lora.transfer import to_device

if TYPE_CHECKING:
    from mmdet_gdino_lora.detector import LoRAGroundingDINO

#: Captions of an image that have all classes between them, or all that one answers for.
Captions = tuple[TokenizedCaption, ...]

#: An image's captions, by who answers for their classes.
Routed = dict[Owner, Captions]

#: Whatever is switched on answers for everything.
AS_IT_IS = ''


def captions_to_predict(
    detector: LoRAGroundingDINO, batch_data_samples: SampleList
) -> list[Routed]:
    """Returns captions that have all of each image's classes between them.

    Args:
        detector: Its ``test_cfg.chunked_size`` is the most names of a caption; where it is not set
            or not above 0, a caption has as many as fit. Its ``test_cfg.route`` says who answers.
        batch_data_samples: As for :func:`~.samples.captions_of`.

    Returns:
        Per image, its captions by who answers for their classes.
    """
    tokenizer = detector.language_model.caption_tokenizer
    chunk_size = max(0, detector.test_cfg.get('chunked_size', 0))
    route = detector.route
    routed: list[Routed]
    if route is None or not route.applies(detector):
        routed = [
            {AS_IT_IS: captions_of(sample, tokenizer, chunk_size)} for sample in batch_data_samples
        ]
    else:
        owners = partial(route.owners, detector)
        routed = [
            captions_by_owner(sample, tokenizer, owners, chunk_size)
            for sample in batch_data_samples
        ]
    captions = [tuple(chain.from_iterable(of_image.values())) for of_image in routed]
    detector.lost_phrases.count(batch_data_samples, captions, lost_boxes=False)
    return routed


def detect(
    detector: LoRAGroundingDINO,
    batch_inputs: Tensor,
    batch_data_samples: SampleList,
    routed: Sequence[Routed],
    rescale: bool = True,
) -> dict[str, Any]:
    """Adds ``pred_instances`` to the samples, of all captions of each image.

    What one answers is the best over its captions; what several answer is put together, as mmdet
    does with chunks. The image tower runs once where it is the same for all, and what else doesn't
    depend on the caption once for each who answers.

    Args:
        detector: In eval mode.
        batch_inputs: Normalised images [B, 3, H, W].
        batch_data_samples: One per image.
        routed: As :func:`captions_to_predict` returns them.
        rescale: Whether boxes are returned in the original image's pixels.

    Returns:
        The head's inputs under the last captions.
    """
    answers: list[list[InstanceData]] = [[] for _ in routed]
    features = None
    for owner in dict.fromkeys(chain.from_iterable(routed)):
        rows = [row for row, of_image in enumerate(routed) if owner in of_image]
        samples = [batch_data_samples[row] for row in rows]
        captions = [routed[row][owner] for row in rows]
        with _answering(detector, owner):
            if features is None or not shares_image_tower(detector):
                features = detector.extract_feat(batch_inputs)
            own = features if len(rows) == len(routed) else [level[rows] for level in features]
            head_inputs = _detect(detector, own, samples, captions, rescale)
        for row, sample in zip(rows, samples):
            answers[row].append(sample.pred_instances)
    for sample, of_image in zip(batch_data_samples, answers):
        sample.pred_instances = _together(of_image)
    _add_label_names(batch_data_samples, routed)
    return head_inputs


def _answering(detector: LoRAGroundingDINO, owner: Owner) -> AbstractContextManager[None]:
    return nullcontext() if owner == AS_IT_IS else answering(detector, owner)


def _detect(
    detector: LoRAGroundingDINO,
    features: Sequence[Tensor],
    samples: SampleList,
    captions: Sequence[Captions],
    rescale: bool,
) -> dict[str, Any]:
    """Adds the best over all captions of each image, as the detector is now."""
    prepared = detector.pre_transformer(features, samples)
    found: list[list[InstanceData]] = [[] for _ in captions]
    for number in range(max(map(len, captions))):
        # an image with fewer captions than others is shown its last one again, to nobody's eyes
        shown = [of_image[min(number, len(of_image) - 1)] for of_image in captions]
        head_inputs = detector.transform(prepared, detector.encode_text(shown), samples)
        for sample, caption in zip(samples, shown):
            sample.token_positive_map = _token_positive_map(caption)
        results = detector.bbox_head.predict(
            **head_inputs, batch_data_samples=samples, rescale=rescale
        )
        for of_image, instances, caption, all_of_image in zip(found, results, shown, captions):
            if number < len(all_of_image):
                of_image.append(_with_labels_of(caption, instances))
    most = detector.bbox_head.test_cfg.get('max_per_img', detector.num_queries)
    for sample, of_image in zip(samples, found):
        sample.pred_instances = _best(of_image, most)
    return head_inputs


def _token_positive_map(caption: TokenizedCaption) -> dict[int, list[int]]:
    """Numbers the classes in the caption from 1, as mmdet does, and gives their tokens."""
    spans = [caption.token_spans[label] for label in caption.labels]
    return {number + 1: list(tokens) for number, tokens in enumerate(spans)}


def _with_labels_of(caption: TokenizedCaption, instances: InstanceData) -> InstanceData:
    """Goes from the place of a class in its caption to its label."""
    if not isinstance(caption.labels, range):
        labels = to_device(torch.tensor(caption.labels), instances.labels.device)
        instances.labels = labels[instances.labels]
    return instances


def _best(found: Sequence[InstanceData], most: int) -> InstanceData:
    """Keeps the best of all captions, where mmdet would keep ``most`` of each."""
    if len(found) == 1:
        return found[0]
    instances = InstanceData.cat(list(found))
    return instances[instances.scores.topk(min(most, len(instances))).indices]


def _together(answers: Sequence[InstanceData]) -> InstanceData:
    """Puts together what several answer, the best first."""
    if len(answers) == 1:
        return answers[0]
    instances = InstanceData.cat(list(answers))
    return instances[instances.scores.argsort(descending=True, stable=True)]


def _add_label_names(samples: SampleList, routed: Sequence[Routed]) -> None:
    """Names what was found in all images of a batch, for one wait for the device."""
    found = [sample.pred_instances for sample in samples]
    labels = iter(torch.cat([instances.labels for instances in found]).tolist())
    for instances, of_image in zip(found, routed):
        captions = chain.from_iterable(of_image.values())
        names = {n: caption.names[n].strip() for caption in captions for n in caption.labels}
        instances.label_names = [names[label] for label in islice(labels, len(instances))]


@torch.no_grad()
def validate(detector: LoRAGroundingDINO, inputs: Tensor, samples: SampleList) -> list:
    """Detects what is in a batch, and computes its losses where that can be done.

    Without ground truth there are none, and none where an image's classes take several captions:
    the objective is defined on one. Ranks need not agree on that, for without gradients the
    criterion doesn't wait for other ranks.

    Args:
        detector: In eval mode.
        inputs: Normalised images [B, 3, H, W].
        samples: One per image, with or without ``gt_instances``.

    Returns:
        The samples with predictions and, where there are losses, one more element with ``loss``.
    """
    routed = captions_to_predict(detector, samples)
    head_inputs = detect(detector, inputs, samples, routed)
    if len(set(chain.from_iterable(routed))) > 1:
        _say_once(
            'model.test_cfg.route gives the classes to several that answer, so validation computes '
            'detections and no losses.'
        )
        return samples
    captions = [next(iter(of_image.values())) for of_image in routed]
    most = max(map(len, captions))
    if most > 1:
        _say_once(
            f'The classes take {most} captions an image, so validation computes detections and no '
            'losses.'
        )
        return samples
    lacking = _lacks_truth(samples, [caption for (caption,) in captions])
    if lacking:
        _say_once(f'{lacking}, so validation computes detections and no losses.')
        return samples
    truth = samples
    if annotations_follow_resize(runner_config()):
        truth = with_resized_boxes(samples)
    of_images = [caption for (caption,) in captions]
    truth = without_lost(truth, of_images)
    detector.token_targets.attach(truth, of_images, head_inputs['text_token_mask'])
    with _answering(detector, next(iter(routed[0]))):
        losses = detector.bbox_head.loss(**head_inputs, batch_data_samples=truth)
    return [*samples, BaseDataElement(loss=losses)]


def _lacks_truth(samples: SampleList, captions: Sequence[TokenizedCaption]) -> str:
    """Says why a batch has no losses: no labels in it, or labels that aren't the captions'."""
    for sample in samples:
        if 'labels' not in sample.get('gt_instances', ()):
            return 'Images of the validation data have no labels (an unlabelled or test set)'
        if 'phrase_ids' in sample:
            return 'Labels of the validation data are not those of the phrases (Flickr30k entities)'
    # of all images in one wait for the device
    labels = iter(torch.cat([sample.gt_instances.labels for sample in samples]).tolist())
    for sample, caption in zip(samples, captions):
        named = {-1, *caption.labels, *caption.lost}
        of_image = islice(labels, len(sample.gt_instances.labels))
        missing = [n for n in of_image if n not in named]
        if missing:
            where = sample.get('img_path', '')
            return (
                f'Boxes of the validation data have labels that stand for nothing in the caption '
                f'(label {missing[0]} of {where or "an image"}, for one)'
            )
    return ''


@cache
def _say_once(message: str) -> None:
    print_log(message, logger='current')

"""What the detector does outside training: detections, and validation losses behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmdet.structures import SampleList
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmdet_gdino_lora.engine.runner_config import annotations_follow_resize, runner_config
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.samples import with_resized_boxes
from mmdet_gdino_lora.text import TokenizedCaption

if TYPE_CHECKING:
    from mmdet_gdino_lora.detector import LoRAGroundingDINO


def detect(
    detector: LoRAGroundingDINO,
    batch_inputs: Tensor,
    batch_data_samples: SampleList,
    captions: Sequence[TokenizedCaption],
    rescale: bool = True,
) -> dict[str, Any]:
    """Adds ``pred_instances`` to the samples.

    Args:
        detector: In eval mode.
        batch_inputs: Normalised images [B, 3, H, W].
        batch_data_samples: One per image.
        captions: One per image.
        rescale: Whether boxes are returned in the original image's pixels.

    Returns:
        The head's inputs.

    Raises:
        ConfigError: A caption lacks classes.
    """
    features = detector.extract_feat(batch_inputs)
    head_inputs = detector.forward_transformer(
        features, detector.encode_text(captions), batch_data_samples
    )
    for sample, caption in zip(batch_data_samples, captions):
        if not isinstance(caption.token_spans, tuple):
            raise ConfigError(
                'TokenSpans.num_negatives is set in the test pipeline, so that captions lack '
                'classes, which then could not be detected; remove it there, and for classes '
                'that take more than one caption set model.test_cfg.chunked_size.'
            )
        sample.token_positive_map = {
            label + 1: list(tokens) for label, tokens in enumerate(caption.token_spans)
        }
    results = detector.bbox_head.predict(
        **head_inputs, batch_data_samples=batch_data_samples, rescale=rescale
    )
    for sample, instances, caption in zip(batch_data_samples, results, captions):
        names = caption.names
        instances.label_names = [names[label] for label in instances.labels.tolist()]
        sample.pred_instances = instances
    return head_inputs


def validate(detector: LoRAGroundingDINO, inputs: Tensor, samples: SampleList) -> list:
    """Detections of a batch, and its losses where they can be computed.

    Args:
        detector: In eval mode.
        inputs: Normalised images [B, 3, H, W].
        samples: One per image, with or without ``gt_instances``.

    Returns:
        The samples with predictions and, with ground truth at hand, one more element with ``loss``.
    """
    captions = detector.captions(samples)
    head_inputs = detect(detector, inputs, samples, captions)
    if not all('gt_instances' in sample for sample in samples):
        return samples
    truth = samples
    if annotations_follow_resize(runner_config()):
        truth = with_resized_boxes(samples)
    detector.token_targets.attach(truth, captions, head_inputs['text_token_mask'])
    losses = detector.bbox_head.loss(**head_inputs, batch_data_samples=truth)
    return [*samples, BaseDataElement(loss=losses)]

"""The glue between mmdet's Grounding DINO head and the criterion.

On one side stand mmdet's data samples (``InstanceData``, absolute ``xyxy`` boxes), on the other
the criterion's plain tensors. Nothing is computed here that either side can compute.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import torch
from mmdet.models.dense_heads import GroundingDINOHead
from mmdet.registry import MODELS
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy, bbox_xyxy_to_cxcywh
from mmdet.utils import InstanceList
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor

from mmdet_gdino_lora.layers.branches import all_boxes, all_logits
from mmdet_gdino_lora.layers.refinement import BeforeSigmoid
from mmdet_gdino_lora.objective import GroundingDINOCriterion
from mmdet_gdino_lora.transfer import to_device

LOSSES = dict(
    loss_cls=('FocalLoss', dict(loss_weight='ce_weight', alpha='focal_alpha', gamma='focal_gamma')),
    loss_bbox=('L1Loss', dict(loss_weight='bbox_weight')),
    loss_iou=('GIoULoss', dict(loss_weight='giou_weight')),
)
"""mmdet's losses in the head's config, their types, and what the criterion calls their keys."""

MMDET_DEFAULTS = dict(loss_weight=1.0, alpha=0.25, gamma=2.0)
"""What mmdet's losses take where a config says nothing."""


def criterion_settings(head: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """What the criterion takes from the losses in a config of mmdet's head.

    Args:
        head: Config of the head.

    Returns:
        Arguments of ``GroundingDINOCriterion``, and the settings that mean nothing to it.
    """
    taken: dict[str, float] = {}
    left: list[str] = []
    for loss, (kind, keys) in LOSSES.items():
        config = dict(head.get(loss) or {})
        if not config:
            continue
        given = config.pop('type', kind)
        if getattr(given, '__name__', str(given)).split('.')[-1] != kind:
            left.append(f'{loss}.type={given!r}')
            continue
        config.pop('use_sigmoid', None)
        taken.update({ours: config.pop(key, MMDET_DEFAULTS[key]) for key, ours in keys.items()})
        left += [f'{loss}.{key}={value!r}' for key, value in config.items()]
    return taken, left


@MODELS.register_module()
class GroundingDINOCriterionHead(GroundingDINOHead):
    """mmdet's Grounding DINO head with its loss delegated to ``GroundingDINOCriterion``.

    Parameters, their names, prediction and post-processing are mmdet's; checkpoints are
    interchangeable. It also stands inside a stock ``GroundingDINO`` detector.

    Args:
        criterion: Config of the criterion. ``num_classes``, ``num_decoder_layers``,
            ``match_costs`` and the losses' weights and focal constants are filled in from the
            head, its ``train_cfg.assigner`` and its losses where this config does not give them.
        **kwargs: As for mmdet's ``GroundingDINOHead``. Of its ``loss_cls`` (a ``FocalLoss``),
            ``loss_bbox`` (``L1Loss``) and ``loss_iou`` (``GIoULoss``) the weights, ``alpha`` and
            ``gamma`` are taken; what of them is not is told in the log.
    """

    test_cfg: Mapping[str, Any]

    def __init__(self, criterion: Optional[dict] = None, **kwargs: Any) -> None:
        taken, left = criterion_settings(kwargs)
        # mmdet derives the number of class channels from this loss; nothing else reads it.
        kwargs['loss_cls'] = dict(type='FocalLoss', use_sigmoid=True)
        super().__init__(**kwargs)
        criterion = dict(criterion or {})
        kind = criterion.setdefault('type', 'GroundingDINOCriterion')
        if issubclass(MODELS.get(kind) if isinstance(kind, str) else kind, GroundingDINOCriterion):
            criterion = {**taken, **criterion}
        criterion.setdefault('num_classes', self.num_classes)
        criterion.setdefault('num_decoder_layers', self.num_pred_layer - int(self.as_two_stage))
        if self.train_cfg:
            criterion.setdefault('match_costs', self.assigner.match_costs)
        self.criterion = MODELS.build(criterion)
        if left:
            print_log(
                f'{type(self).__name__}: of the config, {", ".join(left)} is not used; the '
                'objective is set in bbox_head.criterion',
                logger='current',
                level=logging.WARNING,
            )

    def forward(
        self,
        hidden_states: Tensor,
        references: Union[Tensor, Sequence[Tensor]],
        memory_text: Tensor,
        text_token_mask: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """As mmdet's, all layers together.

        Args:
            hidden_states: Decoder outputs [L, B, Q, C].
            references: Reference boxes before each layer, L times or more [B, Q, 4],
                (cx, cy, w, h) in 0..1.
            memory_text: Text features after the encoder [B, T, C].
            text_token_mask: True at real tokens [B, T].

        Returns:
            Token logits [L, B, Q, T or more] and boxes [L, B, Q, 4] in 0..1.
        """
        num_layers = len(hidden_states)
        before = references[:num_layers]
        before = before if isinstance(before, Tensor) else torch.stack(list(before))
        if before.shape[-1] != 4:  # boxes are not refined, and references are points
            references = list(references)
            return super().forward(hidden_states, references, memory_text, text_token_mask)
        logits = all_logits(self.cls_branches, hidden_states, memory_text, text_token_mask)
        boxes = all_boxes(self.reg_branches, hidden_states) + BeforeSigmoid.apply(before, 1e-5)
        return logits, boxes.sigmoid()

    def loss(
        self,
        hidden_states: Tensor,
        references: Union[Tensor, Sequence[Tensor]],
        memory_text: Tensor,
        text_token_mask: Tensor,
        enc_outputs_class: Optional[Tensor],
        enc_outputs_coord: Optional[Tensor],
        batch_data_samples: SampleList,
        dn_meta: Optional[dict[str, int]],
    ) -> dict[str, Tensor]:
        """Weighted loss components of all decoder layers, the encoder and the denoising queries.

        Args:
            hidden_states: Decoder outputs [L, B, Q, C], denoising queries first.
            references: Reference boxes before each layer, L times or more [B, Q, 4],
                (cx, cy, w, h) in 0..1.
            memory_text: Text features after the encoder [B, T, C].
            text_token_mask: True at real tokens [B, T].
            enc_outputs_class: Token logits of the selected proposals [B, Q, T or more] or None.
            enc_outputs_coord: Boxes of the selected proposals [B, Q, 4] or None.
            batch_data_samples: ``gt_instances`` with ``bboxes``, ``labels`` and
                ``positive_maps`` [N, T or more].
            dn_meta: ``num_denoising_queries`` and ``num_denoising_groups``; None without
                denoising.

        Returns:
            The criterion's components times their weights, so that their sum is the loss.
        """
        logits, boxes = self(hidden_states, references, memory_text, text_token_mask)
        num_dn = dn_meta['num_denoising_queries'] if dn_meta else 0
        # split and unbind once: each slice of a stack would get a zero gradient of the whole's size
        sizes = [num_dn, logits.shape[2] - num_dn]
        dn_logits, logits = logits.split(sizes, dim=2)
        dn_boxes, boxes = boxes.split(sizes, dim=2)
        # In one tensor for our criterion, layer by layer for one of the user's own.
        *earlier, last = [
            dict(pred_logits=layer_logits, pred_boxes=layer_boxes)
            for layer_logits, layer_boxes in zip(logits.unbind(), boxes.unbind())
        ]
        outputs: dict[str, Any] = dict(
            last,
            aux_outputs=earlier,
            decoder_outputs=dict(pred_logits=logits, pred_boxes=boxes),
            text_token_mask=text_token_mask,
        )
        if num_dn and dn_meta is not None:
            outputs['dn_outputs'] = dict(
                pred_logits=dn_logits,
                pred_boxes=dn_boxes,
                num_groups=dn_meta['num_denoising_groups'],
            )
        if enc_outputs_class is not None:
            outputs['enc_outputs'] = dict(
                pred_logits=enc_outputs_class, pred_boxes=enc_outputs_coord
            )
        components = self.criterion(outputs, self.targets(batch_data_samples))
        weights = np.array([self.criterion.weight_dict[name] for name in components], np.float32)
        values = torch.stack(list(components.values()))
        return dict(zip(components, (values * to_device(weights, values.device)).unbind()))

    @staticmethod
    def targets(batch_data_samples: SampleList) -> list[dict[str, Any]]:
        """Ground truth in the criterion's form.

        Args:
            batch_data_samples: As in :meth:`loss`.

        Returns:
            Per image: labels [N], boxes [N, 4] as (cx, cy, w, h) in 0..1, token_labels [N, T] and
            img_meta, which a user's own matching cost may read.
        """
        boxes = torch.cat([sample.gt_instances.bboxes for sample in batch_data_samples])
        counts = [len(sample.gt_instances.labels) for sample in batch_data_samples]
        sizes = np.array([sample.img_shape[:2] for sample in batch_data_samples])[:, [1, 0, 1, 0]]
        scale = to_device(np.repeat(sizes, counts, axis=0).astype(np.float32), boxes.device)
        boxes = bbox_xyxy_to_cxcywh(boxes / scale.to(boxes.dtype))
        return [
            dict(
                labels=sample.gt_instances.labels,
                boxes=of_image,
                token_labels=sample.gt_instances.positive_maps,
                img_meta=sample.metainfo,
            )
            for sample, of_image in zip(batch_data_samples, boxes.split(counts))
        ]

    def predict(
        self,
        hidden_states: Tensor,
        references: Union[Tensor, Sequence[Tensor]],
        memory_text: Tensor,
        text_token_mask: Tensor,
        batch_data_samples: SampleList,
        rescale: bool = True,
        **training_inputs: Any,
    ) -> InstanceList:
        """As mmdet's; what only the loss needs (encoder outputs, denoising) is accepted too.

        Args:
            hidden_states: Decoder outputs [L, B, Q, C].
            references: Reference boxes, L times or more [B, Q, 4].
            memory_text: Text features [B, T, C].
            text_token_mask: True at real tokens [B, T].
            batch_data_samples: With ``token_positive_map`` (class number from 1 to its tokens).
            rescale: Whether boxes are returned in the original image's pixels.
            **training_inputs: The detector's other head inputs, not read.

        Returns:
            Per image: ``bboxes`` (absolute xyxy), ``scores`` in 0..1, ``labels``.
        """
        return super().predict(
            hidden_states, references, memory_text, text_token_mask, batch_data_samples, rescale
        )

    def _predict_by_feat_single(
        self,
        cls_score: Tensor,
        bbox_pred: Tensor,
        token_positive_maps: Optional[dict],
        img_meta: dict,
        rescale: bool = True,
    ) -> InstanceData:
        """As mmdet's, without waiting for the device; ``max_per_img`` may be more than there are.

        Args:
            cls_score: Token logits [Q, T].
            bbox_pred: Boxes [Q, 4], (cx, cy, w, h) in 0..1.
            token_positive_maps: Class number from 1 to its tokens; None for one class.
            img_meta: ``img_shape`` and ``scale_factor``.
            rescale: Whether boxes are returned in the original image's pixels.

        Returns:
            ``bboxes`` (absolute xyxy), ``scores`` in 0..1, ``labels``.
        """
        scores = cls_score.sigmoid()
        if token_positive_maps is None:
            scores = scores.amax(-1, keepdim=True)
        else:
            scores = class_scores(scores, [span for _, span in sorted(token_positive_maps.items())])
        most = min(self.test_cfg.get('max_per_img', len(scores)), scores.numel())
        classes = scores.shape[-1]
        scores, places = scores.flatten().topk(most)
        boxes = bbox_cxcywh_to_xyxy(bbox_pred[places // classes])
        height, width = img_meta['img_shape'][:2]
        factors = np.tile(img_meta['scale_factor'] if rescale else (1.0, 1.0), 2)
        numbers = np.stack([np.tile((width, height), 2), factors]).astype(np.float32)
        size, factor = to_device(numbers, boxes.device).to(boxes.dtype)
        boxes = torch.minimum((boxes * size).clamp(min=0), size) / factor
        return InstanceData(bboxes=boxes, scores=scores, labels=places % classes)


def class_scores(scores: Tensor, spans: Sequence[Sequence[int]]) -> Tensor:
    """A class's score is the mean of its tokens', as in mmdet, where every class is an upload.

    Args:
        scores: Of tokens [Q, T].
        spans: The tokens of each of C classes.

    Returns:
        [Q, C].
    """
    longest = max(map(len, spans), default=0)
    index = np.zeros((len(spans), longest), np.int64)
    shares = np.zeros((len(spans), longest), np.float32)
    for number, tokens in enumerate(spans):
        index[number, : len(tokens)] = tokens
        shares[number, : len(tokens)] = 1 / max(1, len(tokens))
    weights = to_device(shares, scores.device).to(scores.dtype)
    return (scores[:, to_device(index, scores.device)] * weights).sum(-1)

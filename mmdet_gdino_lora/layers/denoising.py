"""Denoising queries are made without waiting for the device.

mmdet's generator asks the device for the number of boxes of every image, searches for the labels
to replace, and masks group by group; each of these makes the host wait. The numbers are known on
the host.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from mmdet.models.layers import CdnQueryGenerator
from mmdet.structures import SampleList
from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
from torch import Tensor

from mmdet_gdino_lora.layers.precision import as_autocast
from mmdet_gdino_lora.transfer import to_device


class DenoisingQueryGenerator(CdnQueryGenerator):
    """This generator makes contrastive denoising queries (DINO, section 3.3), laid out as mmdet's.

    Boxes and masks equal mmdet's; replaced labels are drawn from the same distribution.
    """

    def __call__(self, batch_data_samples: SampleList) -> tuple[Tensor, Tensor, Tensor, dict]:
        """Make decoder queries of noised copies of a batch's boxes.

        Args:
            batch_data_samples: ``gt_instances`` with ``bboxes`` (absolute xyxy) and ``labels``,
                and ``img_shape``.

        Returns:
            Content queries [B, Q, C], reference boxes before the sigmoid [B, Q, 4] (cx, cy, w, h),
            the self-attention mask [Q + matching queries] squared, True where attention is barred,
            and ``num_denoising_queries`` (Q) with ``num_denoising_groups``. Q is twice the groups
            times the largest number of boxes: in each group the positives of an image, padded,
            then its negatives.
        """
        labels = torch.cat([sample.gt_instances.labels for sample in batch_data_samples])
        boxes = torch.cat([sample.gt_instances.bboxes for sample in batch_data_samples])
        counts = [len(sample.gt_instances.labels) for sample in batch_data_samples]
        sizes = np.array([sample.img_shape[:2] for sample in batch_data_samples])[:, [1, 0, 1, 0]]
        scale = torch.from_numpy(np.repeat(sizes, counts, axis=0)).to(boxes.dtype)
        boxes = boxes / to_device(scale, boxes.device)
        widest = max(counts)
        num_groups = self.get_num_groups(widest)
        contents = self.generate_dn_label_query(labels, num_groups)
        references = self.generate_dn_bbox_query(boxes, num_groups)

        copies = 2 * num_groups
        images = np.repeat(np.arange(len(counts)), counts)
        places = np.concatenate([np.arange(count) for count in counts])
        columns = np.tile(places, copies) + np.repeat(np.arange(copies) * widest, len(places))
        index = to_device(np.stack([np.tile(images, copies), columns]), contents.device).unbind()
        shape = (len(counts), copies * widest)
        queries = contents.new_zeros(*shape, self.embed_dims).index_put(index, contents)
        reference_points = references.new_zeros(*shape, 4).index_put(index, references)
        mask = self.generate_dn_mask(widest, num_groups, contents.device)
        meta = dict(num_denoising_queries=copies * widest, num_denoising_groups=num_groups)
        return queries, reference_points, mask, meta

    def generate_dn_label_query(self, gt_labels: Tensor, num_groups: int) -> Tensor:
        """Embed the labels, a share of them replaced by random ones.

        Args:
            gt_labels: Labels of all images [N].
            num_groups: Denoising groups.

        Returns:
            [2 * num_groups * N, C].
        """
        # labels without an embedding are the criterion's to refuse or ignore; here CUDA would abort
        labels = gt_labels.clamp(0, self.num_classes - 1).repeat(2 * num_groups)
        replaced = torch.rand_like(labels, dtype=torch.float) < self.label_noise_scale * 0.5
        random = torch.randint_like(labels, 0, self.num_classes)
        return as_autocast(self.label_embedding(torch.where(replaced, random, labels)))

    def generate_dn_bbox_query(self, gt_bboxes: Tensor, num_groups: int) -> Tensor:
        """Add noise by mmdet's own arithmetic; boxes of an empty batch stay empty.

        Args:
            gt_bboxes: (x1, y1, x2, y2) in 0..1 of all images [N, 4].
            num_groups: Denoising groups.

        Returns:
            Noised boxes before the sigmoid, (cx, cy, w, h), [2 * num_groups * N, 4].
        """
        if not len(gt_bboxes):
            return bbox_xyxy_to_cxcywh(gt_bboxes)
        return super().generate_dn_bbox_query(gt_bboxes, num_groups)

    def generate_dn_mask(
        self, max_num_target: int, num_groups: int, device: torch.device
    ) -> Tensor:
        """Say who may not attend to whom in the decoder's self-attention.

        Args:
            max_num_target: The largest number of boxes in an image.
            num_groups: Denoising groups.
            device: Of the mask.

        Returns:
            True where attention is barred: matching queries don't see denoising queries, and
            denoising groups don't see each other [Q, Q].
        """
        return _mask(2 * max_num_target, num_groups, self.num_matching_queries, device)


@lru_cache(maxsize=8)
def _mask(size: int, num_groups: int, num_matching_queries: int, device: torch.device) -> Tensor:
    """Remember the last masks, of about a megabyte each: few numbers of boxes make many batches."""
    with torch.inference_mode(False):
        groups = torch.arange(num_groups * size, device=device).div(
            max(size, 1), rounding_mode='floor'
        )
        groups = torch.cat([groups, groups.new_full((num_matching_queries,), -1)])
        return (groups[None, :] != groups[:, None]) & (groups[None, :] >= 0)

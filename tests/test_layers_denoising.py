"""Denoising queries equal mmdet's where both are deterministic."""

from __future__ import annotations

import pytest
import torch
from mmdet.models.layers import CdnQueryGenerator

from mmdet_gdino_lora.layers.denoising import DenoisingQueryGenerator
from tests.builders import data_samples

ARGS = dict(
    num_classes=5,
    embed_dims=16,
    num_matching_queries=7,
    group_cfg=dict(dynamic=True, num_dn_queries=12),
)


def both() -> tuple[CdnQueryGenerator, DenoisingQueryGenerator]:
    stock, ours = CdnQueryGenerator(**ARGS), DenoisingQueryGenerator(**ARGS)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.mark.parametrize('counts', [(3, 1), (1, 4, 2), (5,), (2, 0)])
def test_layout_and_mask_equal_mmdet(counts: tuple[int, ...], monkeypatch) -> None:
    stock, ours = both()
    for generator in (stock, ours):  # the noise apart, everything is deterministic
        monkeypatch.setattr(generator, 'label_noise_scale', 1e-12)
        monkeypatch.setattr(generator, 'box_noise_scale', 1e-12)
    samples = data_samples('abcde', counts)
    for index, sample in enumerate(samples):  # each image has a size and a shape of its own
        sample.set_metainfo(dict(img_shape=(64 + 8 * index, 96 + 32 * index)))
    expected, got = stock(samples), ours(samples)
    for left, right in zip(expected[:3], got[:3]):
        torch.testing.assert_close(left.float(), right.float(), rtol=0, atol=1e-5)
    assert expected[3] == got[3]


def test_as_many_labels_are_replaced_as_in_mmdet() -> None:
    _, ours = both()
    torch.manual_seed(0)
    weight = torch.arange(5.0)[:, None].expand(5, 16)
    ours.label_embedding.weight.data.copy_(weight)
    labels = ours.generate_dn_label_query(torch.zeros(2000, dtype=torch.long), 1)[:, 0]
    # a quarter is redrawn among five classes, one of which is the label's own
    assert (labels != 0).float().mean().item() == pytest.approx(0.25 * 0.8, abs=0.03)


def test_a_batch_without_boxes_still_reaches_the_embedding() -> None:
    _, ours = both()
    queries, boxes, mask, meta = ours(data_samples('abcde', (0, 0)))
    assert queries.shape == (2, 0, 16) and boxes.shape == (2, 0, 4)
    assert meta['num_denoising_queries'] == 0 and not mask.any()
    (queries.sum() + 0).backward()
    assert ours.label_embedding.weight.grad is not None

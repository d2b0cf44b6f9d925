"""Boxes whose class the caption lacks and labels past all classes end training in one sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmdet_gdino_lora import TokenSpans
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.samples import TokenTargets
from mmdet_gdino_lora.text import CaptionTokenizer
from tests.builders import build, data_samples

NAMES = ['hot dog', 'dog', 'red circle', 'bird', 'car', 'star']
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def detector(text_dir: str, base: str) -> nn.Module:
    return build(text_dir, base_checkpoint=base).train()


def samples_with(labels: list[int]) -> list:
    """Two images; the second has these labels."""
    samples = data_samples(NAMES, [1, len(labels)])
    samples[1].gt_instances.labels = torch.tensor(labels)
    return samples


def test_a_box_that_another_image_brought_along(detector: nn.Module, text_dir: str) -> None:
    samples = samples_with([1, 4])
    transform = TokenSpans(text_dir, num_negatives=0)
    for sample, labels in zip(samples, (samples[0].gt_instances.labels, [1])):
        sample.set_metainfo(transform(dict(text=NAMES, gt_bboxes_labels=labels)))
    with pytest.raises(ConfigError, match=r'image 1 .*label 4.*TokenSpans behind') as caught:
        detector.loss(IMAGES, samples)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('label', [6, 13, 14, 1000])
def test_a_label_past_the_classes(detector: nn.Module, label: int) -> None:
    # past the names of the data, and past the labels that denoising has embeddings of
    with pytest.raises(ConfigError, match=rf'image 1 .*label {label},') as caught:
        detector.loss(IMAGES, samples_with([1, label]))
    assert '\n' not in str(caught.value)


def test_such_rows_are_zero_and_padded_rows_too(text_dir: str) -> None:
    tokenizer = CaptionTokenizer(text_dir)
    whole, part = tokenizer.from_names(NAMES), tokenizer.from_names(NAMES[:2], [3, 1])
    samples = samples_with([1, 0, 3, -1, 4, 6, 10**6])
    mask = torch.ones(2, 20, dtype=torch.bool)
    for caption, known in ((whole, [1, 0, 3, 4]), (part, [1, 3])):
        TokenTargets(None).attach(samples, [whole, caption], mask)
        instances = samples[1].gt_instances
        expected = [label if label in known else -1 for label in instances.labels.tolist()]
        expected = torch.from_numpy(caption.positive_map(expected, 20))
        assert torch.equal(instances.positive_maps, expected)
        assert instances.positive_maps.any(1).sum() == len(known)


def test_padded_rows_are_ignored(detector: nn.Module) -> None:
    padded, without = samples_with([1, -1]), samples_with([1, -1])
    without[1].gt_instances = without[1].gt_instances[:1]
    detector.eval()
    with torch.no_grad():
        losses = [detector.loss(IMAGES, samples) for samples in (padded, without)]
    detector.train()
    for name, value in losses[1].items():
        torch.testing.assert_close(losses[0][name], value)
    assert torch.isfinite(sum(detector.loss(IMAGES, padded).values()))

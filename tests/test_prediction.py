"""Prediction and validation of more classes than one caption holds, and of part of them."""

from __future__ import annotations

import pytest
import torch
from mmengine.structures import InstanceData
from torch import nn

from mmdet_gdino_lora import TokenSpans, prediction
from mmdet_gdino_lora.errors import ConfigError
from tests.builders import WORDS, build, data_samples

FEW = ['hot dog', 'dog', 'red_circle', 'small bird (left)', 'car', 'green star']
MANY = [f'{a} {b}' for a in WORDS for b in WORDS]  # 3 tokens each, 84 of them in a caption
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def detector(text_dir: str, base: str) -> nn.Module:
    return build(text_dir, lora=None, base_checkpoint=base).eval()


@pytest.fixture
def chunked(detector: nn.Module):
    """The detector with a ``chunked_size`` and other settings for the test."""

    def with_settings(**settings) -> nn.Module:
        detector.test_cfg = {**before, **settings}
        detector.bbox_head.test_cfg = {**before, **settings}
        return detector

    before = detector.test_cfg
    yield with_settings
    with_settings()


@torch.no_grad()
def predicted(detector: nn.Module, names, images=IMAGES, transform=None) -> list[InstanceData]:
    samples = data_samples(WORDS, [1] * len(images))
    for sample in samples:
        text = names if isinstance(names, dict) else tuple(names)
        results = dict(text=text, custom_entities=True)
        sample.set_metainfo(transform(results) if transform else results)
    return [sample.pred_instances for sample in detector.predict(images, samples)]


def best_of(parts: list[InstanceData], begins: list[int], most: int) -> InstanceData:
    """The best of several detections of one image, whose labels begin anew in each."""
    for part, begin in zip(parts, begins):
        part.labels += begin
        part.label_names = [str(name) for name in part.label_names]
    together = InstanceData.cat(parts)
    return together[together.scores.argsort(descending=True)[:most]]


def assert_same(one: InstanceData, other: InstanceData, **tolerance: float) -> None:
    assert len(one) == len(other) and list(one.label_names) == list(other.label_names)
    assert torch.equal(one.labels, other.labels)
    tolerance = tolerance or dict(rtol=0, atol=0)
    torch.testing.assert_close(one.scores, other.scores, **tolerance)
    torch.testing.assert_close(one.bboxes, other.bboxes, **tolerance)


@pytest.mark.parametrize('prepared', [True, False], ids=['TokenSpans', 'names alone'])
def test_more_classes_than_a_caption_holds_are_all_looked_for(
    detector: nn.Module, text_dir: str, prepared: bool
) -> None:
    transform = TokenSpans(text_dir) if prepared else None
    found = predicted(detector, MANY, transform=transform)
    begins = [0, 84, 168]
    parts = [predicted(detector, MANY[begin : begin + 84]) for begin in begins]
    for image, instances in enumerate(found):
        assert len(instances) == 30
        assert_same(instances, best_of([part[image] for part in parts], begins, 30))
        assert instances.label_names == [MANY[label] for label in instances.labels.tolist()]
        assert instances.labels.max() >= 84


@pytest.mark.parametrize('prepared', [True, False], ids=['TokenSpans', 'names alone'])
def test_captions_have_as_many_names_as_the_config_says(
    chunked, text_dir: str, prepared: bool
) -> None:
    transform = TokenSpans(text_dir) if prepared else None
    begins = [0, 4]
    parts = [predicted(chunked(), FEW[begin : begin + 4]) for begin in begins]
    found = predicted(chunked(chunked_size=4), FEW, transform=transform)
    for image, instances in enumerate(found):
        assert_same(instances, best_of([part[image] for part in parts], begins, 30))


def test_one_caption_is_detected_from_to_the_bit_whatever_the_chunk(chunked, text_dir) -> None:
    expected = predicted(chunked(), FEW)
    for size in (6, 500):
        for transform in (None, TokenSpans(text_dir)):
            found = predicted(chunked(chunked_size=size), FEW, transform=transform)
            assert_same(found[0], expected[0])
            assert_same(found[1], expected[1])


def test_chunks_too_large_for_a_caption_are_parted_again(chunked) -> None:
    begins = [0, 84, 100, 184]
    ends = [84, 100, 184, 196]
    parts = [predicted(chunked(), MANY[b:e], IMAGES[:1])[0] for b, e in zip(begins, ends)]
    found = predicted(chunked(chunked_size=100), MANY, IMAGES[:1])[0]
    assert_same(found, best_of(parts, begins, 30))


def test_a_chunk_may_offer_less_than_an_image_gets(chunked) -> None:
    # 30 queries times one class are fewer than the 40 detections that are asked for
    found = predicted(chunked(chunked_size=1, max_per_img=40), FEW)
    assert len(found[0]) == 40 and len(set(found[0].labels.tolist())) > 1
    assert len(predicted(chunked(max_per_img=40), FEW[:1])[0]) == 30


def test_the_image_tower_runs_once_for_all_captions(chunked) -> None:
    detector, calls = chunked(chunked_size=1), []
    hook = detector.backbone.register_forward_hook(lambda *_: calls.append(1))
    predicted(detector, FEW)
    hook.remove()
    assert len(calls) == 1


def test_images_of_a_batch_may_take_different_numbers_of_captions(
    detector: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mmdet's image tower sees the padding of a caption, so it has to be the same in every batch
    monkeypatch.setattr(detector.language_model, 'pad_to_max', True)
    samples = data_samples(FEW, [1, 1])
    samples[0].set_metainfo(dict(text=tuple(MANY)))
    with torch.no_grad():
        many, few = (s.pred_instances for s in detector.predict(IMAGES, samples))
    assert_same(few, predicted(detector, FEW, IMAGES[1:])[0], rtol=1e-5, atol=1e-5)
    assert_same(many, predicted(detector, MANY, IMAGES[:1])[0], rtol=1e-5, atol=1e-5)


def test_labels_of_a_label_map_are_kept(detector: nn.Module, text_dir: str) -> None:
    label_map = {str(2 * label): name for label, name in enumerate(MANY)}
    expected = predicted(detector, MANY, IMAGES[:1])[0]
    for transform in (None, TokenSpans(text_dir)):
        found = predicted(detector, label_map, IMAGES[:1], transform)[0]
        assert torch.equal(found.labels, 2 * expected.labels)
        assert found.label_names == expected.label_names
        assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize('prepared', [True, False], ids=['TokenSpans', 'names alone'])
def test_labels_of_a_label_map_that_fits_are_kept(chunked, text_dir: str, prepared: bool) -> None:
    label_map = {'7': 'cat', '3': 'hot dog', '5': 'car'}
    labels = torch.tensor([7, 3, 5])
    transform = TokenSpans(text_dir) if prepared else None
    for size in (0, 2):
        detector = chunked(chunked_size=size)
        found = predicted(detector, label_map, transform=transform)[0]
        same = predicted(detector, list(label_map.values()))[0]
        assert torch.equal(found.labels, labels[same.labels])
        assert found.label_names == same.label_names
        assert torch.equal(found.scores, same.scores)


def test_validation_of_many_classes_gives_detections_and_says_that_it_gives_no_losses(
    detector: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    prediction._say_once.cache_clear()
    monkeypatch.setattr(prediction, 'print_log', lambda message, **_: told.append(message))
    for _ in range(2):
        results = detector.val_step(
            dict(inputs=list(IMAGES), data_samples=data_samples(MANY, [2, 1]))
        )
        assert [len(sample.pred_instances) for sample in results] == [30, 30]
    assert len(told) == 1 and '3 captions' in told[0] and 'no losses' in told[0]


def test_training_on_more_classes_than_a_caption_holds_advises_to_sample(
    detector: nn.Module, text_dir: str
) -> None:
    for prepared in (False, True):
        samples = data_samples(MANY, [1, 1])
        if prepared:
            for sample in samples:
                sample.set_metainfo(TokenSpans(text_dir)(dict(text=sample.text)))
        with pytest.raises(ConfigError, match=r"196 classes .*num_negatives='fit'"):
            detector.loss(IMAGES, samples)


def test_captions_that_lack_classes_are_refused_where_classes_are_looked_for(
    detector: nn.Module, text_dir: str
) -> None:
    transform = TokenSpans(text_dir, num_negatives=2)
    with pytest.raises(ConfigError, match='num_negatives is set in the test pipeline'):
        predicted(detector, FEW, transform=transform)


def test_a_text_that_names_nothing_is_told(detector: nn.Module) -> None:
    with pytest.raises(ConfigError, match='names no class'):
        predicted(detector, [])

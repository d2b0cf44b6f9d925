"""TokenSpans in mmdet's pipelines: what stock code reads from it, and what it samples."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import PackDetInputs
from mmdet.models.detectors.glip import create_positive_map
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample

from mmdet_gdino_lora.datasets import TokenSpans
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.samples import caption_of
from mmdet_gdino_lora.text import build_caption
from tests.builders import build_stock, data_samples

COCO = CocoDataset.METAINFO['classes']
KEYS = ('text', 'tokens_positive', 'caption_tokens')


def build(name, **kwargs):
    return TRANSFORMS.build(dict(type='TokenSpans', tokenizer_name=name, **kwargs))


def made_up_names(count):
    return tuple(f'{COCO[i % 80]} {COCO[(7 * i + i // 80) % 80]}_{i}' for i in range(count))


def stock_positive_maps(transform, results, labels):
    """What mmdet's ``GroundingDINO.loss`` makes of the results."""
    tokenized = transform.caption_tokenizer.tokenizer([results['text']], return_tensors='pt')
    spans = [results['tokens_positive'][label] for label in labels]
    return create_positive_map(tokenized, spans).bool().float()


def test_coco_classes_become_a_caption_with_all_spans(minilm):
    transform = build(minilm)
    results = transform(dict(text=COCO, gt_bboxes_labels=np.array([16, 52])))
    text, spans = build_caption(COCO).text, build_caption(COCO).spans
    assert results['text'] == text.rstrip()
    assert results['tokens_positive'] == [[list(span) for span in one] for one in spans]
    expected = stock_positive_maps(transform, results, range(80))
    ours = results['caption_tokens'].positive_map(range(80), 256)
    assert torch.equal(torch.from_numpy(ours), expected)
    assert ours.any(1).all()


def test_mmdet_adds_nothing_to_the_caption_when_it_predicts(text_dir):
    # GroundingDINO.predict puts another '. ' behind a caption that doesn't end with a dot
    assert build(text_dir)(dict(text=('cat', 'dog')))['text'] == 'cat. dog.'


def test_a_test_pipeline_needs_no_annotations(text_dir):
    assert build(text_dir)(dict(text=['cat', 'dog']))['caption_tokens'].token_spans == ((1,), (3,))


def test_odvg_label_maps_keep_their_labels(text_dir):
    results = build(text_dir)(dict(text={'0': 'cat', '1': 'hot dog'}))
    assert results['caption_tokens'].token_spans == ((1,), (3, 4))
    results = build(text_dir)(dict(text={'7': 'cat', '3': 'hot dog'}))
    assert results['tokens_positive'] == {7: [[0, 3]], 3: [[5, 12]]}
    assert results['caption_tokens'].token_spans == {7: (1,), 3: (3, 4)}


def test_odvg_phrases_are_found_in_their_caption(text_dir):
    phrases = {
        0: dict(phrase='cat', tokens_positive=[[2, 5]]),
        2: dict(phrase='red car', tokens_positive=[[11, 18]]),
    }
    results = build(text_dir)(dict(text='a cat on a red car', phrases=phrases))
    assert results['text'] == 'a cat on a red car.'
    assert results['tokens_positive'] == {0: [[2, 5]], 2: [[11, 18]]}
    transform = build(text_dir)
    expected = stock_positive_maps(transform, results, [0, 2])
    assert torch.equal(
        torch.from_numpy(results['caption_tokens'].positive_map([0, 2], 256)), expected
    )


def test_text_with_marked_phrases_and_joined_names_are_read_too(text_dir):
    transform = build(text_dir)
    results = transform(dict(text='a cat', tokens_positive=[[[2, 5]]]))
    assert results['caption_tokens'].token_spans == ((2,),)
    results = transform(dict(text='cat. hot dog. ', custom_entities=True))
    assert results['caption_tokens'].token_spans == ((1,), (3, 4))


@pytest.mark.parametrize(
    'results',
    [
        dict(text='the cat on the left', tokens_positive=-1),
        dict(text='two cats'),
    ],
    ids=['referring expression', 'free text'],
)
def test_what_nobody_marked_is_left_to_the_detector(text_dir, results):
    assert build(text_dir)(dict(results)) == results


def test_prompted_classes_keep_their_names_characters(text_dir):
    prompts = {'cat': dict(prefix='small ', suffix=' on a car')}
    results = build(text_dir)(dict(text=('cat', 'dog'), caption_prompt=prompts))
    assert results['text'] == 'small cat on a car. dog.'
    assert results['tokens_positive'] == [[[6, 9]], [[20, 23]]]
    assert results['caption_tokens'].token_spans == ((2,), (8,))
    results = build(text_dir)(dict(text=('cat', 'dog'), caption_prompt=None))
    assert results['text'] == 'cat. dog.'


def test_classes_past_the_limit_come_in_several_captions_unless_negatives_are_sampled(minilm):
    names = made_up_names(1203)
    transform = build(minilm)
    results = transform(dict(text=names))
    assert results['text'] == names and 'tokens_positive' not in results
    captions = results['caption_tokens']
    assert [label for caption in captions for label in caption.labels] == list(range(1203))
    lengths = transform.caption_tokenizer.lengths(names)
    for caption, following in zip(captions, [*captions[1:], None]):
        assert caption.num_tokens <= 256
        if following is not None:  # nor would another name have fitted in
            assert caption.num_tokens + lengths[following.labels[0]] > 256
        for label, name in caption.names.items():
            assert name == names[label].replace('_', ' ')
            [(begin, end)] = caption.tokens_positive[label]
            assert caption.text[begin:end] == name
    results = build(minilm, num_negatives='fit')(dict(text=names, gt_bboxes_labels=np.array([9])))
    assert results['caption_tokens'].num_tokens <= 256


def test_one_caption_that_is_to_hold_all_classes_names_those_past_the_limit(minilm):
    names = made_up_names(1203)
    transform = build(minilm)
    sample = DetDataSample(metainfo=transform(dict(text=names)))
    with pytest.raises(ConfigError, match='1203 classes takes .* max_tokens=256') as error:
        caption_of(sample, transform.caption_tokenizer)
    assert repr(names[60]) in str(error.value) or 'more would be lost' in str(error.value)
    assert "num_negatives='fit'" in str(error.value)


def test_captions_in_chunks_travel_through_mmdets_packing_and_to_workers(minilm):
    results = build(minilm)(dict(text=made_up_names(300)))
    results.update(img=np.zeros((4, 4, 3), dtype=np.uint8))
    sample = PackDetInputs(meta_keys=KEYS)(results)['data_samples']
    assert sample.caption_tokens[0] is results['caption_tokens'][0]
    sample = pickle.loads(pickle.dumps(sample))
    for sent, arrived in zip(results['caption_tokens'], sample.caption_tokens):
        assert arrived.token_spans == sent.token_spans


@settings(deadline=None, max_examples=60)
@given(
    positives=st.lists(st.integers(0, 299), max_size=30),
    num_negatives=st.one_of(st.just('fit'), st.integers(0, 40)),
    seed=st.integers(0, 2**32 - 1),
)
def test_sampled_captions_hold_all_positives_and_fit(minilm, positives, num_negatives, seed):
    names = made_up_names(300)
    transform = _sampling(minilm, num_negatives)
    text = {str(i): name for i, name in enumerate(names)} if seed % 2 else names
    np.random.seed(seed)  # noqa: NPY002
    results = transform(dict(text=text, gt_bboxes_labels=np.array(positives, dtype=np.int64)))
    caption = results['caption_tokens']
    assert set(positives) <= set(caption.token_spans)
    negatives = len(caption.token_spans) - len(set(positives))
    lengths = transform.caption_tokenizer.lengths(names)
    assert caption.num_tokens == 2 + lengths[list(caption.token_spans)].sum() <= 256
    if num_negatives == 'fit':
        assert caption.num_tokens + lengths.max() > 256
    else:
        assert negatives <= num_negatives
    for label, [(begin, end)] in results['tokens_positive'].items():
        assert results['text'][begin:end] == names[label].replace('_', ' ')
    labels = sorted(caption.token_spans)
    assert torch.equal(
        torch.from_numpy(caption.positive_map(labels, 256)),
        stock_positive_maps(transform, results, labels),
    )
    whole = transform.caption_tokenizer.tokenizer(results['text']).input_ids
    assert caption.input_ids.tolist() == whole


_transforms: dict = {}


def _sampling(name, num_negatives):
    if num_negatives not in _transforms:
        _transforms[num_negatives] = build(name, num_negatives=num_negatives)
    return _transforms[num_negatives]


def test_sampling_follows_numpys_seed(minilm):
    transform = build(minilm, num_negatives=20)
    names, texts = made_up_names(300), []
    for seed in (1, 1, 2):
        np.random.seed(seed)  # noqa: NPY002
        texts.append(transform(dict(text=names, gt_bboxes_labels=np.array([4])))['text'])
    assert texts[0] == texts[1] != texts[2]


def test_every_negative_has_the_same_chance(text_dir):
    transform = build(text_dir, num_negatives=2)
    np.random.seed(0)  # noqa: NPY002
    seen = np.zeros(6)
    for _ in range(600):
        results = transform(dict(text=list('abcdef'), gt_bboxes_labels=np.array([2, 2])))
        seen[list(results['tokens_positive'])] += 1
    assert seen[2] == 600
    assert (abs(seen[[0, 1, 3, 4, 5]] - 240) < 60).all()


def test_positives_that_dont_fit_and_labels_without_a_class_are_told(text_dir):
    transform = build(text_dir, max_tokens=6, num_negatives=1)
    with pytest.raises(ConfigError, match="'dog' would be lost|'cat' would be lost|'car'"):
        transform(dict(text=('cat', 'dog', 'car'), gt_bboxes_labels=np.array([0, 1, 2])))
    with pytest.raises(ConfigError, match='label 3 '):
        transform(dict(text=('cat', 'dog', 'car'), gt_bboxes_labels=np.array([3])))
    with pytest.raises(ConfigError, match="num_negatives='some'"):
        build(text_dir, num_negatives='some')


def test_it_travels_through_mmdets_packing_and_to_workers(text_dir):
    transform = pickle.loads(pickle.dumps(copy.deepcopy(build(text_dir))))
    results = transform(dict(text=('cat', 'dog'), gt_bboxes_labels=np.array([1])))
    results.update(img=np.zeros((4, 4, 3), dtype=np.uint8), gt_bboxes=np.zeros((1, 4)))
    sample = PackDetInputs(meta_keys=KEYS)(results)['data_samples']
    assert sample.caption_tokens is results['caption_tokens']
    assert sample.tokens_positive == [[[0, 3]], [[5, 8]]]
    sample = pickle.loads(pickle.dumps(sample))
    assert sample.caption_tokens.token_spans == ((1,), (3,))
    json.dumps(sample.tokens_positive)


def test_stock_grounding_dino_trains_and_predicts_the_same_from_it(text_dir):
    model = build_stock(text_dir)
    model.init_weights()
    plain, spans = (data_samples(['dog', 'hot dog', 'car'], [2, 3]) for _ in range(2))
    transform = build(text_dir)
    for sample in spans:
        sample.set_metainfo(transform(dict(text=sample.text)))
    images = torch.randn(2, 3, 64, 64)
    losses, detections = [], []
    for samples in (plain, spans):
        torch.manual_seed(0)
        loss = model.train().loss(images, copy.deepcopy(samples))
        losses.append({key: float(value.detach()) for key, value in loss.items()})
        with torch.no_grad():
            results = model.eval().predict(images, copy.deepcopy(samples))
        detections.append([r.pred_instances for r in results])
    assert losses[0] == losses[1]
    for before, after in zip(*detections):
        assert torch.equal(before.scores, after.scores)
        assert torch.equal(before.bboxes, after.bboxes)
        assert torch.equal(before.labels, after.labels)
        assert before.label_names == after.label_names


def test_stock_grounding_dino_trains_from_sampled_captions(text_dir):
    model = build_stock(text_dir)
    samples = data_samples(['dog', 'hot dog', 'car', 'cat', 'bird'], [2, 3])
    transform = build(text_dir, num_negatives=1)
    for sample in samples:
        labels = sample.gt_instances.labels.numpy()
        results = transform(dict(text=sample.text, gt_bboxes_labels=labels))
        sample.set_metainfo({key: results[key] for key in KEYS})
    model.train().loss(torch.randn(2, 3, 64, 64), samples)
    for sample in samples:
        positive_maps = sample.gt_instances.positive_maps.numpy()
        labels = sample.gt_instances.labels
        assert np.array_equal(positive_maps, sample.caption_tokens.positive_map(labels, 256))
        assert positive_maps.any(1).all()


@pytest.mark.parametrize('num_classes', [80, 1203])
def test_names_are_tokenised_once_for_all_images(minilm, num_classes, monkeypatch):
    transform = build(minilm, num_negatives=None if num_classes == 80 else 'fit')
    names = COCO if num_classes == 80 else made_up_names(num_classes)
    results = dict(text=names, gt_bboxes_labels=np.array([3, 5, 70]))
    transform(dict(results))
    tokenizer = transform.caption_tokenizer
    encode, tokenised = tokenizer._encode, []
    monkeypatch.setattr(tokenizer, '_encode', lambda text: tokenised.append(text) or encode(text))
    for _ in range(3):
        transform(dict(results))
    assert not tokenised
    transform(dict(results, text=[*names[:-1], 'a new name']))
    assert tokenised == ['a new name. ']


def test_a_caption_that_is_full_to_the_last_token_is_one_caption(text_dir):
    names = ('hot dog', 'cat')  # 3 and 2 tokens, dots included
    assert build(text_dir, max_tokens=7)(dict(text=names))['text'] == 'hot dog. cat.'
    for max_tokens in (6, 5):
        results = build(text_dir, max_tokens=max_tokens)(dict(text=names))
        assert [caption.text for caption in results['caption_tokens']] == ['hot dog.', 'cat.']


def test_padding_that_somebody_asked_of_the_tokenizer_stays_with_them(text_dir):
    transform = build(text_dir)
    tokenizer = transform.caption_tokenizer.tokenizer
    tokenizer(['cat'], padding='max_length', max_length=9, truncation=True)
    assert transform(dict(text=('cat', 'hot dog')))['caption_tokens'].num_tokens == 7
    tokenizer(['cat'], padding='max_length', max_length=3, truncation=True)
    assert transform(dict(text=('large dog', 'car')))['caption_tokens'].num_tokens == 7


def test_it_is_exported_for_mmdet():
    assert TRANSFORMS.get('TokenSpans') is TokenSpans

"""Phrases that the model can't see are left out with their boxes, and what is kept stays right."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mmdet.datasets.transforms import PackDetInputs
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.dataset import pseudo_collate
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmdet_gdino_lora import TokenSpans
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text import CaptionTokenizer
from tests.builders import build, data_samples
from tests.faults.smallest import model as smallest_model
from tests.mistakes.typed import warnings_of_the_log

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT = 'a hot dog and  a red car'
BLANK = [[13, 15]]
#: 0 and 2 are seen; 1 is white space, 4 lies behind the caption's end.
SPANS = {0: [[2, 9]], 1: BLANK, 2: [[17, 24]], 4: [[90, 95]]}
META = ('text', 'tokens_positive', 'caption_tokens', 'phrases', 'img_path')

_WORD = st.sampled_from(
    ['cat', 'hot dog', 'T-shirt', 'unaffable', '  ', '.', 'café', '自行车', '?!']
)


@pytest.fixture(scope='module')
def tokenizer(minilm: str) -> CaptionTokenizer:
    return CaptionTokenizer(minilm, max_tokens=12)


@pytest.fixture(scope='module')
def spans(minilm: str) -> TokenSpans:
    return TokenSpans(minilm, max_tokens=12)


@pytest.fixture(scope='module')
def detector(text_dir: str, small_base: str) -> nn.Module:
    return build(text_dir, base_checkpoint=small_base, **smallest_model())


@st.composite
def captions(draw: st.DrawFn) -> tuple[str, dict[int, list[list[int]]]]:
    text = ' '.join(draw(st.lists(_WORD, min_size=1, max_size=14)))
    span = st.tuples(st.integers(0, len(text) + 5), st.integers(1, 9)).map(lambda s: [s[0], sum(s)])
    phrases = draw(
        st.dictionaries(st.integers(0, 9), st.lists(span, min_size=1, max_size=2), max_size=6)
    )
    return text, phrases


def whole_spans(tokenizer: CaptionTokenizer, text: str, phrase: list) -> tuple[int, ...]:
    """A phrase's tokens in the caption that nobody cut, by transformers' own call."""
    text = text.rstrip()
    text += '' if text.endswith('.') else '.'
    offsets = tokenizer.tokenizer(text, return_offsets_mapping=True)['offset_mapping']
    return tuple(
        token
        for token, (begin, end) in enumerate(offsets)
        if any(begin < last and first < end for first, last in phrase)
    )


@given(captions())
def test_what_is_kept_has_the_spans_of_the_whole_caption_and_the_rest_is_lost(
    tokenizer: CaptionTokenizer, case: tuple[str, dict]
) -> None:
    text, phrases = case
    caption = tokenizer.from_text(text, phrases, drop_lost=True)
    seen = {}
    for label, phrase in phrases.items():
        tokens = whole_spans(tokenizer, text, phrase)
        if tokens and max(tokens) < 11:  # token 11 is [SEP]
            seen[label] = tokens
    assert dict(zip(caption.labels, map(tuple, map(caption.token_spans.get, seen)))) == seen
    assert set(caption.lost) == set(phrases) - set(seen)
    assert caption.num_tokens <= 12
    # the caption is cut behind a token: what is left has these tokens, whoever reads it
    again = tokenizer.tokenizer(caption.text).input_ids
    assert again == caption.input_ids.tolist()
    for label in caption.labels:
        assert caption.tokens_positive[label] == phrases[label]


@given(captions(), st.lists(st.integers(0, 9), max_size=8), st.booleans())
def test_boxes_labels_masks_and_flags_go_together(
    spans: TokenSpans, case: tuple[str, dict], labels: list[int], plain: bool
) -> None:
    text, phrases = case
    labels = [label for label in labels if label in phrases]
    count = len(labels)
    boxes = np.arange(count, dtype=np.float32)[:, None].repeat(4, 1)
    masks = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 3, 3), dtype=np.uint8)
    results = dict(
        text=text,
        phrases={k: dict(phrase='', tokens_positive=v) for k, v in phrases.items()},
        gt_bboxes=boxes if plain else HorizontalBoxes(torch.from_numpy(boxes)),
        gt_bboxes_labels=np.array(labels, dtype=np.int64),
        gt_ignore_flags=np.zeros(count, dtype=bool),
        gt_masks=BitmapMasks(masks, 3, 3),
        gt_names=[f'box {place}' for place in range(count)],
        gt_seg_map=np.zeros((max(count, 1), 5)),
    )
    before = copy.deepcopy(results['phrases'])
    asked = dict(results)
    found = spans(results) if phrases else None
    if found is None:
        return
    caption = found['caption_tokens']
    kept = [place for place, label in enumerate(labels) if label not in caption.lost]
    assert found['gt_bboxes_labels'].tolist() == [labels[place] for place in kept]
    tensor = found['gt_bboxes'] if plain else found['gt_bboxes'].tensor.numpy()
    assert tensor[:, 0].tolist() == kept
    assert [int(mask[0, 0]) for mask in found['gt_masks'].masks] == kept
    assert len(found['gt_ignore_flags']) == len(kept)
    assert found['gt_names'] == [f'box {place}' for place in kept]
    assert found['gt_seg_map'].shape == (max(count, 1), 5)
    assert set(found['phrases']) == set(caption.labels) == set(phrases) - set(caption.lost)
    assert asked['phrases'] == before  # the data set's own
    assert caption.positive_map(found['gt_bboxes_labels']).any(1).all()


def samples(**metainfo: Any) -> list:
    """Two images as mmdet's own pipeline hands them over; of the first, boxes 1 and 3 are lost."""
    made = data_samples(['cat'], [4, 1], size=32)
    for sample, labels in zip(made, ([0, 1, 2, 4], [2])):
        sample.gt_instances.labels = torch.tensor(labels)
        sample.set_metainfo(dict(text=TEXT, tokens_positive=SPANS, img_path='x.jpg', **metainfo))
    made[1].set_metainfo(dict(tokens_positive={2: SPANS[2]}, img_path='y.jpg'))
    return made


def losses(detector: nn.Module, made: Sequence) -> dict[str, float]:
    torch.manual_seed(0)
    return {key: float(value.detach()) for key, value in detector.loss(IMAGES, made).items()}


def test_a_lost_phrases_box_counts_for_nothing_without_token_spans_too(text_dir, small_base):
    detector = build(text_dir, base_checkpoint=small_base, **{**smallest_model(), 'dn_cfg': None})
    detector.train()
    with warnings_of_the_log() as told:
        found = losses(detector, samples())
        assert losses(detector, samples()) == found
    kept = samples()
    kept[0].gt_instances = kept[0].gt_instances[torch.tensor([0, 2])]
    kept[0].set_metainfo(dict(tokens_positive={0: SPANS[0], 2: SPANS[2]}))
    expected = losses(detector, kept)
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(told) == 1 and '\n' not in told[0]
    for part in ('with their boxes', "'  ' (characters", 'has no token', 'x.jpg', '2 of its 4'):
        assert part in told[0]
    assert (detector.lost_phrases.phrases, detector.lost_phrases.images) == (4, 2)


def test_counts_are_told_again_when_they_have_grown_tenfold(detector: nn.Module) -> None:
    detector.train()
    made = samples()
    detector.lost_phrases.__init__()
    tokenizer = detector.language_model.caption_tokenizer
    with warnings_of_the_log() as told:
        for _ in range(12):
            of_images = [(tokenizer.from_text(TEXT, SPANS, drop_lost=True),), ()]
            detector.lost_phrases.count(made, of_images, lost_boxes=True)
    assert len(told) == 1
    assert detector.lost_phrases._told == 20


def test_an_image_that_lost_every_phrase_trains_with_denoising_and_is_searched(detector) -> None:
    made = samples()
    made[0].set_metainfo(dict(tokens_positive={1: BLANK, 4: SPANS[4]}))
    made[0].gt_instances = made[0].gt_instances[torch.tensor([1, 3])]
    assert all(np.isfinite(value) for value in losses(detector.train(), made).values())
    for sample in made:
        del sample.gt_instances
    with torch.no_grad():
        first, second = detector.eval().predict(IMAGES, made)
    assert len(first.pred_instances) == 0
    assert set(second.pred_instances.labels.tolist()) <= {2}


def test_validation_measures_on_all_boxes_and_computes_losses_on_those_it_can(detector) -> None:
    made = samples()
    detector.eval()
    *found, last = detector.val_step(dict(inputs=list(IMAGES), data_samples=made))
    assert found[0].gt_instances.labels.tolist() == [0, 1, 2, 4]
    assert set(found[0].pred_instances.labels.tolist()) <= {0, 2}
    assert all(np.isfinite(float(value)) for value in last.loss.values())


class Written(Dataset):
    """Six images with a caption, whose second phrase is blank, through a training pipeline."""

    def __init__(self, text_dir: str) -> None:
        self._steps = [TokenSpans(text_dir), PackDetInputs(meta_keys=META)]

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict:
        results = dict(
            text=TEXT,
            phrases={k: dict(phrase='', tokens_positive=SPANS[k]) for k in (0, 1)},
            img=np.zeros((32, 32, 3), dtype=np.uint8),
            img_path=f'{index}.jpg',
            gt_bboxes=np.array([[2, 2, 9, 9], [4, 4, 20, 20]], dtype=np.float32),
            gt_bboxes_labels=np.array([0, 1]),
            gt_ignore_flags=np.zeros(2, dtype=bool),
        )
        for step in self._steps:
            results = step(results)
        return results


@pytest.fixture
def batches(text_dir: str) -> Iterator[dict]:
    return iter(DataLoader(Written(text_dir), 2, num_workers=2, collate_fn=pseudo_collate))


def test_what_workers_leave_out_is_told_once_by_the_main_process(batches, detector) -> None:
    detector.train().lost_phrases.__init__()
    with warnings_of_the_log() as told:
        for batch in batches:
            for sample in batch['data_samples']:
                assert sample.gt_instances.labels.tolist() == [0]
                shape = dict(batch_input_shape=(32, 32), img_shape=(32, 32))
                sample.set_metainfo(shape)
            detector.loss(IMAGES, batch['data_samples'])
    assert len(told) == 1 and '(1 of its 2 phrases)' in told[0]
    assert (detector.lost_phrases.phrases, detector.lost_phrases.images) == (6, 6)


@pytest.mark.parametrize('span, told', [(BLANK, 'stands for'), ([[200, 203]], "'dog' would be")])
def test_it_stops_where_asked(text_dir: str, span: list, told: str) -> None:
    text = 'a b   c ' * 25 + 'dog' if told != 'stands for' else TEXT
    results = dict(text=text, phrases={3: dict(phrase='', tokens_positive=span)})
    transform = TokenSpans(text_dir, max_tokens=9, on_lost_phrase='stop')
    with pytest.raises(ConfigError, match=told) as caught:
        transform(results)
    assert "on_lost_phrase='drop'" in str(caught.value) and 'negatives' not in str(caught.value)
    assert set(TokenSpans(text_dir, max_tokens=9)(results)['caption_tokens'].lost) == {3}
    with pytest.raises(ConfigError, match="on_lost_phrase='skip' must be"):
        TokenSpans(text_dir, on_lost_phrase='skip')


def test_data_that_is_measured_by_phrase_keeps_its_boxes(text_dir: str) -> None:
    results = dict(
        text=TEXT,
        tokens_positive=[SPANS[0], BLANK],
        phrases=['hot dog', '  '],  # Flickr30k's
        phrase_ids=[0, 1],
        gt_bboxes=np.zeros((2, 4)),
        gt_bboxes_labels=np.array([1, 1]),
    )
    found = TokenSpans(text_dir)(results)
    assert len(found['gt_bboxes']) == 2 and found['phrases'] == ['hot dog', '  ']
    assert found['tokens_positive'] == {0: SPANS[0]}

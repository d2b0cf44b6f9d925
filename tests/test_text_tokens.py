"""Captions, token spans and segments, against mmdet and against the whole caption tokenised."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmdet.datasets import CocoDataset
from mmdet.models.detectors.glip import create_positive_map
from mmdet.models.detectors.grounding_dino import GroundingDINO, clean_label_name
from mmdet.models.language_models.bert import generate_masks_with_special_tokens_and_transfer_map

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text import CaptionTokenizer, build_caption, clean_name, token_labels

COCO = CocoDataset.METAINFO['classes']
HARD = (
    'dog',
    'hot dog',
    'T-shirt',
    'traffic_light',
    'cell phone (old)',
    'café au lait',
    'cafe\u0301',
    '自行车',
    'Ünïcode_Straße',
    'dog',
    ' padded  name ',
    'U.S. flag',
    'what? sign',
    '3/4 ton-truck',
    "cat's_eye",
    '🚲 bike',
    'end.',
    '[SEP] sign',
)
NAME = st.one_of(
    st.sampled_from(HARD + COCO),
    st.text(min_size=1, max_size=12),
    st.text('ab é_-.()?\u0301字', min_size=1, max_size=10),
)


@pytest.fixture(scope='module')
def tokenizer(minilm: str) -> CaptionTokenizer:
    return CaptionTokenizer(minilm)


def mmdet_caption(names):
    words = [clean_label_name(name) for name in names]
    return GroundingDINO.to_plain_text_prompts(type('D', (), dict(_special_tokens='. ')), words)


def spans_from_positive_map(tokenized, tokens_positive):
    positive_map = create_positive_map(tokenized, tokens_positive)
    return [tuple(torch.nonzero(row).flatten().tolist()) for row in positive_map]


@given(st.text())
def test_names_are_cleaned_as_mmdet_does(name):
    assert clean_name(name) == clean_label_name(name)


@given(st.lists(NAME, max_size=12))
def test_caption_and_character_spans_equal_mmdets(names):
    caption = build_caption(names)
    text, tokens_positive = mmdet_caption(names)
    assert caption.text == text
    assert [[list(span) for span in spans] for spans in caption.spans] == tokens_positive


@pytest.mark.parametrize('names', [COCO, HARD], ids=['coco', 'hard'])
def test_token_spans_equal_mmdets_positive_map(tokenizer, names):
    caption = tokenizer.from_names(names)
    tokenized = tokenizer.tokenizer([caption.text])
    assert tokenized.input_ids[0] == caption.input_ids.tolist()
    _, tokens_positive = mmdet_caption(names)
    assert caption.tokens_positive == tokens_positive
    assert list(caption.token_spans) == spans_from_positive_map(tokenized, tokens_positive)


def test_a_name_within_another_and_a_name_twice_keep_spans_of_their_own(tokenizer):
    caption = tokenizer.from_names(['hot dog', 'dog', 'dog'])
    assert caption.token_spans == ((1, 2), (4,), (6,))


def test_a_name_that_ends_in_many_spaces_keeps_its_tokens(tokenizer):
    # mmdet looks at most three characters back and is left with a row of zeros here
    assert tokenizer.from_names(['dog       ']).token_spans == ((1,),)


@settings(deadline=None, max_examples=300)
@given(st.lists(NAME, min_size=1, max_size=12))
def test_names_tokenised_one_by_one_equal_the_whole_caption(tokenizer, names):
    try:
        caption = tokenizer.from_names(names)
    except ConfigError as error:
        assume('no word in it' not in str(error))
        raise
    whole = tokenizer.tokenizer(build_caption(names).text, return_offsets_mapping=True)
    assert caption.input_ids.tolist() == whole['input_ids']
    for spans, tokens in zip(caption.tokens_positive, caption.token_spans):
        assert tokens == tuple(
            i
            for i, (begin, end) in enumerate(whole['offset_mapping'])
            if any(begin < last and end > first for first, last in spans)
        )


@settings(deadline=None, max_examples=300)
@given(st.lists(NAME, min_size=1, max_size=12))
def test_token_spans_equal_mmdets_where_a_name_begins_and_ends_in_a_token(tokenizer, names):
    try:
        caption = tokenizer.from_names(names)
    except ConfigError:
        assume(False)
    tokenized = tokenizer.tokenizer([caption.text])
    expected = spans_from_positive_map(tokenized, caption.tokens_positive)
    for [(begin, end)], tokens, mmdet in zip(
        caption.tokens_positive, caption.token_spans, expected
    ):
        if tokenized.char_to_token(begin) and tokenized.char_to_token(end - 1):
            assert tokens == mmdet


@settings(deadline=None, max_examples=300)
@given(st.lists(NAME, min_size=1, max_size=12), st.booleans())
def test_segments_equal_mmdets_block_mask(tokenizer, names, dotted):
    text = build_caption(names).text if dotted else ' '.join(names)
    caption = tokenizer.from_plain_text(text)
    ids = torch.from_numpy(caption.input_ids.astype(np.int64))[None]
    mask, positions = generate_masks_with_special_tokens_and_transfer_map(
        dict(input_ids=ids), tokenizer.special_ids
    )
    segments = torch.from_numpy(caption.segment_ids)
    assert torch.equal(segments[:, None] == segments, mask[0])
    assert caption.position_ids.tolist() == positions[0].tolist()


@pytest.mark.parametrize('name', ['', '   ', '(old)', '_', '\u200b', '.', '?.'])
def test_a_name_without_a_word_is_an_error_that_names_it(tokenizer, name):
    with pytest.raises(ConfigError, match='no word in it') as error:
        tokenizer.from_names(['cat', name])
    assert repr(name) in str(error.value)


def test_classes_past_the_limit_are_named(tokenizer):
    names = [f'class{"abcdefgh"[i % 8]} number {i}' for i in range(100)]
    with pytest.raises(ConfigError, match='max_tokens=256') as error:
        tokenizer.from_names(names)
    fitting = next(i for i, name in enumerate(names) if repr(name) in str(error.value))
    assert tokenizer.from_names(names[:fitting]).num_tokens <= 256
    with pytest.raises(ConfigError):
        tokenizer.from_names(names[: fitting + 1])


def test_the_limit_counts_every_token(tokenizer):
    small = CaptionTokenizer(tokenizer.tokenizer, max_tokens=7)
    assert small.from_names(['hot dog', 'cat']).num_tokens == 7
    with pytest.raises(ConfigError, match="'cow' would be lost"):
        small.from_names(['hot dog', 'cat', 'cow'])


def test_positive_map_leaves_padded_rows_empty_and_refuses_unknown_labels(tokenizer):
    caption = tokenizer.from_names(['cat', 'hot dog'])
    positive_map = caption.positive_map([1, -1, 0], num_tokens=9)
    assert positive_map.dtype == np.float32
    assert [np.flatnonzero(row).tolist() for row in positive_map] == [[3, 4], [], [1]]
    assert caption.positive_map([]).shape == (0, caption.num_tokens)
    for label in (2, -2):
        with pytest.raises(ConfigError, match=f'label {label} '):
            caption.positive_map([label])


def test_labels_of_a_part_of_the_classes_are_kept(tokenizer):
    caption = tokenizer.from_names(['hot dog', 'cat'], labels=[7, 2])
    assert caption.token_spans == {7: (1, 2), 2: (4,)}
    assert caption.tokens_positive == {7: [[0, 7]], 2: [[9, 12]]}
    class_map = caption.class_map()
    assert class_map.shape == (8, 7)
    assert np.array_equal(class_map[[2, 7]], caption.positive_map([2, 7]))
    assert class_map[[0, 1, 3, 4, 5, 6]].sum() == 0
    with pytest.raises(ConfigError, match='label 1 '):
        caption.positive_map([1])


def test_phrases_of_a_written_caption_are_found(tokenizer):
    text = 'A man in a T-shirt walks his hot dog'
    spans = {0: [[2, 5]], 4: [[11, 18], [29, 36]]}
    caption = tokenizer.from_text(text, spans)
    tokens = tokenizer.tokenizer.convert_ids_to_tokens(caption.input_ids.tolist())
    assert caption.text == text + '.'
    assert [tokens[i] for i in caption.token_spans[4]] == ['t', '-', 'shirt', 'hot', 'dog']
    assert caption.names[4] == 'T-shirt / hot dog'
    assert spans_from_positive_map(
        tokenizer.tokenizer([caption.text]), list(caption.tokens_positive.values())
    ) == [caption.token_spans[0], (5, 6, 7, 10, 11)]


def test_a_phrase_outside_its_caption_or_past_the_limit_is_an_error(tokenizer):
    with pytest.raises(ConfigError, match='stands for'):
        tokenizer.from_text('a man', [[[40, 45]]])
    text = 'word ' * 300 + 'dog.'
    with pytest.raises(ConfigError, match="'dog' would be lost"):
        tokenizer.from_text(text, [[[len(text) - 4, len(text) - 1]]])
    assert tokenizer.from_text(text, [[[0, 4]]]).num_tokens == 256


def test_captions_are_remembered_and_travel_light(tokenizer):
    caption = tokenizer.from_names(COCO)
    assert tokenizer.from_names(COCO) is caption
    assert copy.deepcopy(caption) is caption
    assert len(pickle.dumps(caption)) < 10_000
    fresh = pickle.loads(pickle.dumps(tokenizer))
    assert not fresh._captions
    assert fresh.from_names(COCO).token_spans == caption.token_spans


def test_token_labels_need_nothing_but_a_tokenizer(tokenizer):
    caption, labels = token_labels(['cat', 'hot dog'], torch.tensor([1, 0, -1]), tokenizer)
    assert caption == 'cat. hot dog.'
    assert labels.tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0] * 7]
    again = token_labels(['cat', 'hot dog'], [1, 0, -1], tokenizer.tokenizer, max_tokens=7)
    assert torch.equal(again[1], labels)


def test_a_special_token_outside_the_vocabulary_does_not_split_at_unknown_words(text_dir):
    tokenizer = CaptionTokenizer(text_dir, special_tokens=('[CLS]', '[SEP]', '.', '!'))
    caption = tokenizer.from_names(['日 cat'])
    assert caption.segment_ids.tolist() == [0, 1, 1, 1, 2]


def test_a_missing_text_model_is_told_with_its_name(tmp_path):
    for name in (str(tmp_path / 'nothing'), str(tmp_path), 'weights/no-such-model', 'no-such'):
        with pytest.raises(ConfigError, match='no text model there') as error:
            CaptionTokenizer(name)
        assert repr(name) in str(error.value)

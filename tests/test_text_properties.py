"""Captions and spans of any names there may be."""

from __future__ import annotations

import itertools
import unicodedata

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text import CaptionTokenizer, clean_name
from mmdet_gdino_lora.text.tokens import TokenizedCaption

# Any character at all, and those that meet the caption's own signs more often than by chance.
NAMES = st.lists(
    st.text(
        st.one_of(st.characters(), st.sampled_from('ab. _()?-\u0301\u200b\xad\ufe0f')), max_size=9
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture(scope='module')
def tokenizer(minilm: str) -> CaptionTokenizer:
    return CaptionTokenizer(minilm)


def caption_of(tokenizer: CaptionTokenizer, names: list[str]) -> TokenizedCaption:
    try:
        return tokenizer.from_names(names)
    except ConfigError as error:
        assert '\n' not in str(error)
        assume(False)
        raise


@settings(max_examples=300)
@given(NAMES)
def test_a_spans_text_is_the_cleaned_name(tokenizer: CaptionTokenizer, names: list[str]) -> None:
    caption = caption_of(tokenizer, names)
    for name, (span,) in zip(names, caption.tokens_positive):
        assert caption.text[slice(*span)] == clean_name(name)
    assert len(caption.tokens_positive) == len(caption.token_spans) == len(names)


@settings(max_examples=300)
@given(NAMES)
@example(['dog', '\ud800'])
def test_spans_do_not_overlap_and_every_token_lies_in_its_span(
    tokenizer: CaptionTokenizer, names: list[str]
) -> None:
    caption = caption_of(tokenizer, names)
    spans = [span for (span,) in caption.tokens_positive]
    for (_, end), (begin, _) in itertools.pairwise(spans):
        assert end < begin
    tokens = [token for span in caption.token_spans for token in span]
    assert tokens == sorted(set(tokens)) and all(caption.token_spans)
    offsets = tokenizer.tokenizer(caption.text, return_offsets_mapping=True)['offset_mapping']
    for (begin, end), span in zip(spans, caption.token_spans):
        for token in span:
            first, last = offsets[token]
            assert begin <= first < last <= end
    special = {0, len(caption.input_ids) - 1}
    assert special.isdisjoint(tokens)


@settings(max_examples=100)
@given(NAMES, st.sampled_from(('NFC', 'NFD', 'NFKC', 'NFKD')))
def test_a_name_is_any_of_its_unicode_forms(
    tokenizer: CaptionTokenizer, names: list[str], form: str
) -> None:
    caption = caption_of(tokenizer, [unicodedata.normalize(form, name) for name in names])
    assert caption.num_tokens == len(caption.input_ids) <= tokenizer.max_tokens


def test_half_a_character_is_told(tokenizer: CaptionTokenizer) -> None:
    # json.loads makes one of an escape that was cut: "\\ud83d"
    with pytest.raises(ConfigError, match='half a character'):
        tokenizer.from_names(['dog', '\ud83d bike'])

"""Names that stand in one text, and prompts that say more for a class than its name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.detectors.grounding_dino import GroundingDINO, clean_label_name
from mmdet.structures import DetDataSample
from torch import nn

from mmdet_gdino_lora import TokenSpans
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.samples import caption_of, captions_of
from mmdet_gdino_lora.text import CaptionTokenizer, build_caption, prompted, split_names
from tests.builders import build, build_stock, data_samples

ROOT = Path(__file__).parent.parent
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module')
def tokenizer(text_dir: str) -> CaptionTokenizer:
    return CaptionTokenizer(text_dir)


# ------------------------------------------------------------------------------- names in one text

WORD = st.text('abcé-?/(', min_size=1, max_size=6)
PLAIN = st.lists(WORD, min_size=1, max_size=3).map(' '.join)
DOTTED = st.sampled_from(['U.S. flag', 'St. Bernard', '3.5 inch disk', '.22 rifle', 'mr. t.'])


def mmdet_names(text: str) -> list[str]:
    """The lines of mmdet's ``GroundingDINO.get_tokens_and_prompts``."""
    return list(filter(lambda x: len(x) > 0, text.strip('. ').split('. ')))


@given(st.lists(st.one_of(PLAIN, DOTTED), min_size=1, max_size=5), st.sampled_from([' .', ' . ']))
def test_names_joined_by_dots_that_stand_alone_are_found_again(names, end):
    assert split_names(' . '.join(names) + end) == names
    if len(names) > 1:
        assert split_names(' . '.join(names)) == names


@given(st.lists(PLAIN, min_size=1, max_size=5), st.sampled_from(['. ', ' . ']), st.booleans())
def test_both_forms_are_read_as_mmdet_reads_them(names, separator, dot_at_end):
    text = separator.join(names) + separator.rstrip() * dot_at_end
    assert split_names(text) == names == [name.strip() for name in mmdet_names(text)]


@given(st.text('ab. ', max_size=12))
def test_no_name_is_empty_or_has_spaces_at_its_ends(text):
    names = split_names(text)
    assert all(name and name == name.strip() for name in names)
    letters = [character for character in text if character in 'ab']
    assert [c for c in ''.join(names) if c in 'ab'] == letters


@pytest.mark.parametrize(
    'text, names',
    [
        ('U.S. flag . car', ['U.S. flag', 'car']),
        ('cat. hot dog. ', ['cat', 'hot dog']),
        ('cat', ['cat']),
        ('cat.dog', ['cat.dog']),
        (' . ', []),
        ('', []),
        ('cat ... dog.', ['cat', 'dog.']),
    ],
)
def test_examples(text, names):
    assert split_names(text) == names


def test_all_who_read_such_a_text_find_the_same_names(
    tokenizer, text_dir, monkeypatch, tmp_path, capsys
):
    text = 'U.S. flag . car'
    expected = ('U.S. flag', 'car')
    sample = DetDataSample(metainfo=dict(text=text, custom_entities=True))
    assert caption_of(sample, tokenizer).names == expected
    results = TokenSpans(text_dir)(dict(text=text, custom_entities=True))
    assert results['caption_tokens'].names == expected
    assert _image_demos_names(text, monkeypatch, tmp_path) == list(expected)


def _image_demos_names(text, monkeypatch, tmp_path):
    """The names that ``image_demo.py`` looks for; what follows its command line is left out."""
    import cv2
    import numpy as np

    from mmdet_gdino_lora.commands import image_demo

    class Asked(Exception):
        pass

    def detect(detector, pipeline, image, names):
        raise Asked(names)

    image = str(tmp_path / 'image.png')
    cv2.imwrite(image, np.zeros((4, 4, 3), dtype=np.uint8))
    monkeypatch.setattr(image_demo, 'load', lambda *args: (None, None))
    monkeypatch.setattr(image_demo, 'detect', detect)
    config = str(ROOT / 'configs' / 'gdino_lora_shapes.py')
    monkeypatch.setattr(sys, 'argv', ['image_demo.py', config, 'x.pth', image, '--texts', text])
    with pytest.raises(Asked) as asked:
        image_demo.main()
    return asked.value.args[0]


# ------------------------------------------------------------------------------------------ prompts

NAMES = ['hot dog', 'red_circle', 'car', 'small bird (left)', 'star']
PROMPTS = {
    'red circle': dict(prefix='small ', suffix=' of a person'),
    'car': dict(name='green car', suffix='. large'),
    'star': dict(prefix='hot dog. '),
    'nobody': dict(name='cat'),
}


def mmdets_prompt(names, prompts):
    stub = type('D', (), dict(_special_tokens='. '))
    return GroundingDINO.to_enhance_text_prompts(
        stub, [clean_label_name(n) for n in names], prompts
    )


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from(NAMES), max_size=6),
    st.dictionaries(
        st.sampled_from([clean_label_name(name) for name in NAMES]),
        st.dictionaries(st.sampled_from(['prefix', 'name', 'suffix']), st.sampled_from('xyz')),
    ),
)
def test_captions_and_character_spans_of_prompts_equal_mmdets(names, prompts):
    caption = build_caption(prompted(names, prompts))
    text, tokens_positive = mmdets_prompt(names, prompts)
    assert caption.text == text
    assert [[list(span) for span in spans] for spans in caption.spans] == tokens_positive


def test_the_tokens_of_a_class_are_those_of_its_name_within_the_prompt(tokenizer):
    caption = tokenizer.from_names(prompted(NAMES, PROMPTS))
    assert caption.text == (
        'hot dog. small red circle of a person. green car. large. small bird . hot dog. star.'
    )
    tokens = tokenizer.tokenizer.convert_ids_to_tokens(caption.input_ids.tolist())
    words = [' '.join(tokens[i] for i in spans) for spans in caption.token_spans]
    assert words == ['hot dog', 'red circle', 'green car', 'small bird', 'star']
    assert caption.names == ('hot dog', 'red circle', 'car', 'small bird ', 'star')
    whole = tokenizer.tokenizer(caption.text).input_ids
    assert caption.input_ids.tolist() == whole


def test_a_class_is_found_by_its_name_before_cleaning_too_and_other_keys_are_told(tokenizer):
    caption = tokenizer.from_names(prompted(['red_circle'], {'red_circle': dict(name='dog')}))
    assert caption.text == 'dog.'
    with pytest.raises(ConfigError, match="'car' has the key 'sufix'"):
        prompted(['car'], {'car': dict(sufix=' of a person')})
    with pytest.raises(ConfigError, match="class name 'car' has no word"):
        tokenizer.from_names(prompted(['car'], {'car': dict(name=' ', prefix='red')}))


@pytest.fixture(scope='module')
def detector(text_dir: str, base: str) -> nn.Module:
    return build(text_dir, base_checkpoint=base, dn_cfg=None)


def prompted_samples(prompts=PROMPTS, transform=None):
    samples = data_samples(NAMES, [2, 3])
    for sample in samples:
        results = dict(text=sample.text, caption_prompt=prompts, custom_entities=True)
        sample.set_metainfo(transform(results) if transform else results)
    return samples


@torch.no_grad()
def detections(detector, samples):
    found = detector.eval().predict(IMAGES, samples)
    return [sample.pred_instances for sample in found]


def test_prompted_classes_are_detected_as_mmdet_does(detector, text_dir, base):
    stock = build_stock(text_dir)
    stock.load_state_dict(torch.load(base)['state_dict'])
    expected = detections(stock, prompted_samples())
    plain = detections(detector, prompted_samples(None))
    for transform in (None, TokenSpans(text_dir)):
        for ours, theirs, other in zip(
            detections(detector, prompted_samples(transform=transform)), expected, plain
        ):
            torch.testing.assert_close(ours.scores, theirs.scores, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.bboxes, theirs.bboxes, rtol=1e-5, atol=1e-4)
            assert torch.equal(ours.labels, theirs.labels)
            # mmdet leaves a blank behind a name that its prompt's suffix follows.
            assert ours.label_names == [name.strip() for name in theirs.label_names]
            assert not torch.allclose(ours.scores, other.scores, atol=1e-3)


def test_prompted_classes_are_trained_and_validated(detector, text_dir):
    batch = [prompted_samples(transform=TokenSpans(text_dir)), prompted_samples()]
    losses = [detector.train().loss(IMAGES, samples) for samples in batch]
    plain = detector.loss(IMAGES, prompted_samples(None))
    for name, value in losses[0].items():
        assert torch.equal(value, losses[1][name])
    assert not torch.allclose(losses[0]['loss_ce'], plain['loss_ce'], rtol=1e-4)
    caption = batch[0][0].caption_tokens
    for samples in batch:
        for sample in samples:
            instances = sample.gt_instances
            expected = torch.from_numpy(caption.positive_map(instances.labels))
            assert torch.equal(instances.positive_maps, expected)
    results = [
        detector.eval().val_step(dict(inputs=list(IMAGES), data_samples=samples))[-1].loss
        for samples in (*batch, prompted_samples(None))
    ]
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])
    assert not torch.allclose(results[0]['loss_ce'], results[2]['loss_ce'], rtol=1e-4)


def test_prompts_stay_with_their_classes_in_sampled_and_chunked_captions(text_dir, tokenizer):
    results = dict(text=NAMES, caption_prompt=PROMPTS, gt_bboxes_labels=[1])
    caption = TokenSpans(text_dir, num_negatives=0)(results)['caption_tokens']
    assert caption.text == 'small red circle of a person.' and list(caption.token_spans) == [1]
    sample = DetDataSample(metainfo=TokenSpans(text_dir)(dict(results, text=NAMES)))
    chunks = captions_of(sample, tokenizer, chunk_size=2)
    assert [chunk.text for chunk in chunks] == [
        'hot dog. small red circle of a person.',
        'green car. large. small bird .',
        'hot dog. star.',
    ]


def test_the_remedy_for_a_caption_that_is_too_long_fits_what_is_done(text_dir: str) -> None:
    tokenizer = CaptionTokenizer(text_dir, max_tokens=5)
    names = ('red star', 'dog', 'cat')
    with pytest.raises(ConfigError, match='in testing let model.test_cfg.chunked_size'):
        tokenizer.from_names(names)
    with pytest.raises(ConfigError, match='lost; use shorter names, for one image') as caught:
        tokenizer.join(names, (0, 1, 2), sampled=True)
    assert 'num_negatives' not in str(caught.value)
    for made in (
        lambda: tokenizer.in_chunks(['red hot dog star']),
        lambda: tokenizer.from_names(['small red hot dog']),
    ):
        with pytest.raises(ConfigError, match='would be lost; shorten the name$'):
            made()

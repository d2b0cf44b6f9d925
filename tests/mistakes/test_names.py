"""Class names that the model can't read, can't tell apart, or can't be shown at once."""
# ruff: noqa: E501  a row of the table is a line

from __future__ import annotations

import json
import shutil
from typing import Any, Callable

import pytest
from torch.utils.data import DataLoader, Dataset

from mmdet_gdino_lora.checks.names import check_texts
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.text import split_names
from tests.mistakes.conftest import Case

STOPS, GOES_ON = True, False


def named(*names: str) -> Callable[[Case], None]:
    """Names the classes so, in the file and in both data sets' configs."""

    def mistake(case: Case) -> None:
        case.file['categories'] = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
        case.data.metainfo = dict(classes=names)

    return mistake


def many(count: int, **settings: Any) -> Callable[[Case], None]:
    def mistake(case: Case) -> None:
        colours, things = ('red', 'blue', 'green'), ('dog', 'cat', 'star', 'car')
        sizes = [
            a + ' ' + b + ' ' + c for a in 'abcdefghijk' for b in 'lmnopqrstuv' for c in 'wxyz'
        ]
        names = [f'{c} {t} {s}' for s in sizes for c in colours for t in things][:count]
        named(*names)(case)
        for step in case.data.pipeline:
            if step['type'] == 'TokenSpans':
                step.update(settings)

    return mistake


def without_vocabulary(case: Case) -> None:
    folder = case.root / 'text'
    shutil.copytree(case.cfg.model.language_model.name, folder)
    (folder / 'vocab.txt').unlink()
    for stage in ('train', 'val'):
        for step in case.cfg[f'{stage}_dataloader'].dataset.pipeline:
            if step['type'] == 'TokenSpans':
                step['tokenizer_name'] = str(folder)


def without_token_spans(case: Case) -> None:
    many(300)(case)
    case.data.pipeline = [s for s in case.data.pipeline if s['type'] != 'TokenSpans']


def prompts(case: Case, *names: str, stages: tuple = ('train', 'val'), **words: str) -> None:
    if names:
        named(*names)(case)
        case.cfg.val_dataloader.dataset.metainfo = dict(classes=names)
        val = case.root / 'annotations/val.json'
        content = json.loads(val.read_text())
        content['categories'] = case.file['categories']
        val.write_text(json.dumps(content))
    for stage in stages:
        for step in case.cfg[f'{stage}_dataloader'].dataset.pipeline:
            if step['type'] == 'TokenSpans':
                step['prompts'] = words


KEY = 'train_dataloader.dataset.metainfo.classes'
#: As in test_data.py; the vocabulary has a few words and the letters.
TABLE = {
    'no vocab.txt': (without_vocabulary, 'text model ...data/text...has neither vocab.txt nor tokenizer.json...read as [UNK]...put the vocab.txt', STOPS),
    'all the same to the model': (named('浣熊', '猫咪', '汽车'), f"{KEY}: 3 of 3 names become the same tokens as another...caption_prompt...first: '浣熊', '猫咪', '汽车' are all read as '[UNK] [UNK]'", STOPS),
    'emoji': (named('🦝', '🐈', 'dog'), "2 of 3 names become the same tokens as another...'[UNK]'", STOPS),
    'letter case alone': (named('Dog', 'dog', 'red cat', 'blue star', 'bird'), "2 of 5 names become the same tokens...first: 'Dog', 'dog' are all read as 'dog'", GOES_ON),
    'parentheses alone': (named('car (old)', 'car (new)', 'red cat', 'star', 'bird'), "2 of 5 names become the same tokens...'car (old)', 'car (new)'", GOES_ON),
    'word that is unknown': (named('red 浣', 'dog', 'cat'), f"{KEY}: 1 of 3 names hold words that the vocabulary of ...lacks ([UNK])...first: 'red 浣', read as 'red [UNK]'", GOES_ON),
    'word in single letters': (named('red racoon', 'dog', 'cat'), "1 of 3 names hold words that fall into single letters...first: 'red racoon', read as 'red r ##a ##c ##o ##o ##n'", GOES_ON),
    'dot in a name': (named('red star no.a', 'dog', 'cat'), "1 of 3 names hold a dot or a question mark...end a name for the model...first: 'red star no.a'", GOES_ON),
    'nothing in a name': (named('()', 'dog', 'cat'), f"{KEY}: class name '()' has no word in it", STOPS),
    '1,500 classes': (many(1500), f"{KEY}: a caption of all 1,500 names takes 9,002 tokens, more than max_tokens=256...TokenSpans(..., num_negatives='fit') in the pipeline of train_dataloader.dataset", STOPS),
    '300 classes without TokenSpans': (without_token_spans, 'a caption of all 300 names takes', STOPS),
}  # fmt: skip


@pytest.mark.parametrize('mistake, sentence, stops', TABLE.values(), ids=list(TABLE))
def test_a_mistake_in_the_names_is_told_in_one_sentence(
    case: Case, mistake: Callable[[Case], None], sentence: str, stops: bool
) -> None:
    mistake(case)
    case.expect(sentence, stops)


@pytest.mark.parametrize('num_negatives', [20, 'fit'])
def test_many_classes_with_sampled_negatives_are_right(case: Case, num_negatives: Any) -> None:
    many(300, num_negatives=num_negatives)(case)
    assert case.check() == ([], None)


def test_a_prompt_may_say_what_the_name_can_not(case: Case) -> None:
    named('red 浣', 'no. 1', 'dog')(case)
    case.data.caption_prompt = {'red 浣': dict(name='red cat'), 'no. 1': dict(name='star')}
    assert case.check() == ([], None)


def test_token_spans_prompts_are_what_is_read_of_a_name(case: Case) -> None:
    prompts(case, 'cls_a', 'cls_b', 'dog', cls_a='red cat', cls_b='star')
    assert case.check() == ([], None)
    prompts(case, cls_a='red cat', cls_b='red cat')
    warned, error = case.check()
    assert "'cls_a', 'cls_b' are all read as 'red cat'" in (error or warned[0])


def test_prompts_that_no_category_has_are_told_with_the_nearest(case: Case) -> None:
    prompts(case, 'cls_a', 'dog', 'cat', clsa='red cat')
    case.expect(
        "TokenSpans.prompts of train_dataloader.dataset has words for 'clsa', of which the data "
        "set has no category; did you mean 'cls_a'?",
        STOPS,
    )


def test_testing_with_other_prompts_than_those_taught_is_told(case: Case) -> None:
    prompts(case, 'red cat', 'dog', 'car', stages=('train',), dog='star')
    case.expect(
        "TokenSpans.prompts of val_dataloader.dataset says 'dog' for 'dog', which training is to "
        "teach as 'star'...same prompts in all pipelines",
        GOES_ON,
    )


def test_what_retain_holds_is_compared_with_the_words(case: Case) -> None:
    prompts(case, 'cls_a', 'dog', 'car', cls_a='Red Cat')
    case.cfg.model.retain = dict(names=['red cat'])
    case.expect("model.retain.names holds 'Red Cat', of the classes of", STOPS)


def test_a_text_model_on_the_hub_is_left_alone(case: Case) -> None:
    named('浣熊', '猫咪', '汽车')(case)
    for stage in ('train', 'val'):
        case.cfg[f'{stage}_dataloader'].dataset.pipeline[-2].tokenizer_name = 'nobody/nothing'
    assert case.check() == ([], None)


@pytest.mark.parametrize(
    'text, told',
    [
        (
            'dog, cat',
            """--texts 'dog, cat': 'dog, cat' is taken for one name...write "dog . cat\"""",
        ),
        ('a small, red car . cat', "'a small, red car' is taken for one name"),
        ('dog . cat', None),
    ],
)
def test_commas_among_names_are_told(text: str, told: str | None) -> None:
    found = check_texts('--texts', text, split_names(text))
    assert len(found) == (told is not None)
    for part in (told or '').split('...') if found else ():
        assert part in found[0].sentence and not found[0].fatal


class Broken(Dataset):
    """Its sentence is told in a loader's worker."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        try:
            raise KeyError('what it stands on')
        except KeyError as error:
            raise ConfigError("names=['a']: there are too many; use fewer") from error


def test_what_a_loaders_worker_says_arrives_as_its_one_sentence() -> None:
    with pytest.raises(ConfigError) as caught:
        next(iter(DataLoader(Broken(), num_workers=1)))
    assert str(caught.value) == "names=['a']: there are too many; use fewer"

"""Names decide who answers: what an adapter was taught goes through it, all else to the base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.lora import base_only, lora_state
from tests.builders import WORDS, build, data_samples
from tests.detectors import same, save, train

TAUGHT = WORDS[:4]  # what tests.detectors.train shows
OLD = ['bird', 'small cat', 'person']
ALL = [OLD[0], *TAUGHT[:2], *OLD[1:], *TAUGHT[2:]]
ROUTE = dict(num_queries=30, test_cfg=dict(max_per_img=20, route=True))


@torch.no_grad()
def ask(detector: nn.Module, *names: list[str]) -> list:
    """What it detects in as many images as there are lists of names."""
    detector.eval()
    torch.manual_seed(7)
    samples = data_samples(names[0], [1] * len(names), size=48)
    for sample, own in zip(samples, names):
        sample.set_metainfo(dict(text=tuple(own)))
    images = torch.randn(len(names), 3, 48, 48)
    return [sample.pred_instances for sample in detector.predict(images, samples)]


def found(instances: Any, names: list[str]) -> tuple:
    """Boxes and scores of what is called by one of the names, and its names."""
    of_names = torch.tensor([name in names for name in instances.label_names], dtype=torch.bool)
    kept = instances[of_names]
    return kept.bboxes, kept.scores, kept.label_names


def equal(one: tuple, other: tuple) -> bool:
    return same(one[:2], other[:2]) and one[2] == other[2]


def near(one: Any, other: Any) -> bool:
    """Alike, as batches of other sizes round otherwise."""
    named = one.label_names == other.label_names
    return named and torch.allclose(one.scores, other.scores, rtol=0, atol=1e-5)


@pytest.fixture(scope='module')
def tuned(text_dir: str, base: str) -> nn.Module:
    detector = build(text_dir, base_checkpoint=base, **ROUTE)
    train(detector, steps=2)
    return detector


@pytest.fixture(scope='module')
def other(text_dir: str, base: str) -> nn.Module:
    """Taught other names, with other adapters."""
    detector = build(text_dir, base_checkpoint=base, lora=dict(preset='all', r=2), **ROUTE)
    train(detector, steps=1)
    lora_state(detector).knows('default', ['person', 'red'])
    return detector


def test_old_names_get_the_bases_answer_and_taught_ones_the_adapters(
    text_dir: str, base: str, tuned: nn.Module
) -> None:
    plain = build(text_dir, lora=None, base_checkpoint=base, test_cfg=dict(max_per_img=20))
    (together,) = ask(tuned, ALL)
    assert equal(found(together, OLD), found(ask(plain, OLD)[0], OLD))
    tuned.route, route = None, tuned.route
    try:
        (alone,) = ask(tuned, TAUGHT)
    finally:
        tuned.route = route
    assert equal(found(together, TAUGHT), found(alone, TAUGHT))
    assert not equal(found(alone, TAUGHT), found(ask(plain, TAUGHT)[0], TAUGHT))
    assert len(together) == 40 and together.scores.diff().max() <= 0
    assert [ALL[label] for label in together.labels.tolist()] == together.label_names


def test_every_image_is_answered_for_its_own_names(tuned: nn.Module) -> None:
    lists = [OLD, ALL, TAUGHT]
    (old, both, taught) = ask(tuned, *lists)
    for instances, names in zip((old, both, taught), lists):
        assert {names[label] for label in instances.labels.tolist()} == set(instances.label_names)
        assert set(instances.label_names) <= set(names)
    assert [len(old), len(both), len(taught)] == [20, 40, 20]
    tuned.route, route = None, tuned.route
    try:
        assert near(ask(tuned, TAUGHT, TAUGHT, TAUGHT)[2], taught)
        with base_only(tuned):
            assert near(ask(tuned, OLD, OLD, OLD)[0], old)
    finally:
        tuned.route = route


@pytest.mark.parametrize('form', ['checkpoint', 'folder'])
def test_files_of_adapters_know_what_they_were_taught(
    text_dir: str, base: str, tuned: nn.Module, other: nn.Module, tmp_path: Path, form: str
) -> None:
    detector = build(text_dir, base_checkpoint=base, **ROUTE)
    load_checkpoint(detector, save(tuned, tmp_path / 'tuned.pth'))
    assert lora_state(detector).taught('default') == set(TAUGHT)
    assert equal(found(ask(detector, ALL)[0], ALL), found(ask(tuned, ALL)[0], ALL))
    source = str(tmp_path / 'other')
    if form == 'folder':
        other.export_adapter(source)
    else:
        save(other, Path(source))
    detector.load_adapter(source, 'other')
    assert lora_state(detector).taught('other') == {'person', 'red'}


def test_adapters_of_one_base_are_a_library(
    text_dir: str, base: str, tuned: nn.Module, other: nn.Module, tmp_path: Path
) -> None:
    route = dict(adapters=dict(other=save(other, tmp_path / 'other.pth')))
    cfg = dict(num_queries=30, base_checkpoint=base)
    tuned_file = save(tuned, tmp_path / 'tuned.pth')

    def library(**names: str) -> nn.Module:
        made = build(text_dir, test_cfg=dict(max_per_img=20, route=dict(route, names=names)), **cfg)
        load_checkpoint(made, tuned_file)
        return made

    with pytest.raises(ConfigError, match="'red' was taught.*'default' and 'other'.*'red': 'o"):
        ask(library(), ALL)
    (together,) = ask(library(red='other', green='base'), ALL)
    plain = build(text_dir, lora=None, base_checkpoint=base, test_cfg=dict(max_per_img=20))
    theirs, bases = ['red', 'person'], ['bird', 'green', 'small cat']
    ordered = [name for name in ALL if name in theirs], [name for name in ALL if name in bases]
    assert equal(found(together, bases), found(ask(plain, ordered[1])[0], bases))
    other.set_adapter()
    other.route, before = None, other.route
    try:
        assert equal(found(together, theirs), found(ask(other, ordered[0])[0], theirs))
    finally:
        other.route = before


def test_the_image_tower_runs_once_where_no_adapter_touches_it(
    tuned: nn.Module, other: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for detector, most in ((tuned, 1), (other, 2)):
        calls: list[int] = []
        run = detector.extract_feat
        monkeypatch.setattr(
            detector, 'extract_feat', lambda x, calls=calls, run=run: (calls.append(1), run(x))[1]
        )
        ask(detector, ALL)
        assert len(calls) == most


def test_whoever_switches_by_hand_has_the_last_word(tuned: nn.Module) -> None:
    tuned.set_adapter(None)
    try:
        (instances,) = ask(tuned, ALL)
    finally:
        tuned.set_adapter()
    assert len(instances) == 20  # one caption, one answer
    tuned.set_adapter(dict(default=0.0))
    try:
        (nothing,) = ask(tuned, TAUGHT)
    finally:
        tuned.set_adapter()
    with base_only(tuned):
        (bases,) = ask(tuned, TAUGHT)
    torch.testing.assert_close(nothing.scores, bases.scores)


def test_validation_has_losses_where_one_answers_for_all(
    tuned: nn.Module, capsys: pytest.CaptureFixture
) -> None:
    images = list(torch.randn(2, 3, 48, 48))

    def validated(names: list[str]) -> list:
        return tuned.val_step(
            dict(inputs=images, data_samples=data_samples(names, [1, 1], size=48))
        )

    tuned.eval()
    before = {name: value.clone() for name, value in tuned.state_dict().items()}
    *_, last = validated(TAUGHT)
    assert set(last.loss) >= {'loss_ce', 'loss_ce_enc'}
    *_, last = validated(OLD)
    with base_only(tuned):
        *_, bases = validated(OLD)
    assert float(last.loss['loss_bbox']) == float(bases.loss['loss_bbox'])
    assert len(validated(ALL)) == 2  # detections alone
    assert all(torch.equal(value, before[name]) for name, value in tuned.state_dict().items())


def test_captions_of_phrases_teach_no_names(text_dir: str, base: str) -> None:
    detector = build(text_dir, base_checkpoint=base).train()
    samples = data_samples(WORDS[:2], [1, 1], size=48)
    for sample in samples:
        spans = {0: [[0, 3]], 1: [[5, 9]]}
        sample.set_metainfo(dict(text='red. blue.', tokens_positive=spans))
    detector.loss(torch.randn(2, 3, 48, 48), samples)
    assert lora_state(detector).taught('default') == set()


@pytest.mark.parametrize(
    ('route', 'said'),
    [
        ('yes', '.*neither True nor a dict.*route=True'),
        (dict(adapter={}), '.*neither True nor a dict'),
        (dict(names=['cat']), r'\.names=.*no dict of texts'),
        (dict(adapters={'base': '.'}), ".*called 'base'.*another name"),
        (dict(adapters={'cards': 'nowhere.pth'}), r".adapters\['cards'\]='nowhere.pth': no such"),
    ],
)
def test_a_route_that_is_none_is_refused_when_the_detector_is_built(
    text_dir: str, route: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=f'model.test_cfg.route{said}'):
        build(text_dir, test_cfg=dict(route=route))


def test_a_route_without_adapters_is_refused(text_dir: str) -> None:
    with pytest.raises(ConfigError, match='no adapters; set model.lora'):
        build(text_dir, lora=None, test_cfg=dict(route=True))


def test_a_route_to_an_adapter_that_is_not_there_is_told(text_dir: str, base: str) -> None:
    cfg = dict(base_checkpoint=base, test_cfg=dict(route=dict(names=dict(red='cards'))))
    with pytest.raises(ConfigError, match="sends 'red' to 'cards'.*put its file into route.adapt"):
        ask(build(text_dir, **cfg), ALL)


def test_an_adapter_of_an_earlier_version_has_to_be_told_its_names(
    text_dir: str, base: str, tuned: nn.Module, tmp_path: Path
) -> None:
    content = dict(meta={}, state_dict=tuned.state_dict())
    del content['state_dict']._metadata['']['mmdet_gdino_lora']['taught']
    path = str(tmp_path / 'earlier.pth')
    torch.save(content, path)
    detector = build(text_dir, base_checkpoint=base, **ROUTE)
    load_checkpoint(detector, path)
    with pytest.raises(ConfigError, match="'default' doesn't say which names.*names={'cat': 'def"):
        ask(detector, ALL)
    test_cfg = dict(max_per_img=20, route=dict(names=dict.fromkeys(TAUGHT, 'default')))
    detector = build(text_dir, base_checkpoint=base, num_queries=30, test_cfg=test_cfg)
    load_checkpoint(detector, path)
    train(detector, steps=1)
    assert lora_state(detector).taught('default') is None  # what it was taught before stays unknown
    load_checkpoint(detector, path)
    assert equal(found(ask(detector, ALL)[0], ALL), found(ask(tuned, ALL)[0], ALL))


def test_sentences_and_phrases_have_no_route(tuned: nn.Module) -> None:
    samples = data_samples(TAUGHT, [1], size=48)
    image = torch.randn(1, 3, 48, 48)
    samples[0].set_metainfo(dict(text='a red bird and a dog', custom_entities=False))
    with pytest.raises(ConfigError, match='the text is a sentence.*custom_entities=True'):
        tuned.eval().predict(image, samples)
    samples[0].set_metainfo(dict(tokens_positive=[[[2, 5]]]))
    with pytest.raises(ConfigError, match='is a caption.*give class names'):
        tuned.predict(image, samples)

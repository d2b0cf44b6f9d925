"""``TokenSpans(prompts=...)``: captions say other words, and everybody else the category names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmdet_gdino_lora import TokenSpans
from mmdet_gdino_lora.errors import ConfigError
from tests.builders import build, data_samples
from tests.faults.smallest import model as smallest_model
from tests.tool_run import Things

NAMES = ('cls_07', 'dog', 'cls_08')
PROMPTS = {'cls_07': 'red star', 'cls 08': 'hot_dog '}


def test_captions_say_the_words_and_labels_keep_their_names(text_dir: str) -> None:
    transform = TokenSpans(text_dir, prompts=PROMPTS)
    found = transform(dict(text=NAMES, sample_idx=0))
    assert found['text'] == 'red star. dog. hot dog.'
    assert found['caption_tokens'].names == ('cls 07', 'dog', 'cls 08')
    assert found['tokens_positive'] == [[[0, 8]], [[10, 13]], [[15, 22]]]
    by_label = transform(dict(text={'7': 'cls_07', '2': 'dog', '1': 'cls_08'}, sample_idx=0))
    assert by_label['tokens_positive'][7] == [[0, 8]]


def test_sampled_captions_and_captions_in_chunks_say_them_too(text_dir: str) -> None:
    sampled = TokenSpans(text_dir, prompts=PROMPTS, num_negatives=0)
    found = sampled(dict(text=NAMES, gt_bboxes_labels=np.array([0, 0])))
    assert found['text'] == 'red star.' and found['tokens_positive'] == {0: [[0, 8]]}
    chunked = TokenSpans(text_dir, max_tokens=7, prompts=PROMPTS)(dict(text=NAMES))
    assert [c.text for c in chunked['caption_tokens']] == ['red star. dog.', 'hot dog.']


def test_mmdets_prefix_and_suffix_stay_and_its_name_gives_way(text_dir: str) -> None:
    said = {
        'cls_07': dict(prefix='small ', name='car', suffix=' on a car'),
        'dog': dict(name='cat'),
    }
    found = TokenSpans(text_dir, prompts=PROMPTS)(dict(text=NAMES, caption_prompt=said))
    assert found['text'] == 'small red star on a car. cat. hot dog.'
    assert found['tokens_positive'][0] == [[6, 14]]
    assert found['caption_tokens'].names[0] == 'cls 07'


def test_a_key_without_a_category_names_the_nearest(text_dir: str) -> None:
    transform = TokenSpans(text_dir, prompts={'cls_7': 'red star'})
    with pytest.raises(ConfigError, match="'cls_7'.*no category; did you mean 'cls_07'"):
        transform(dict(text=NAMES, sample_idx=0))
    # A person who asks for other names than the data set's has none of its keys.
    assert transform(dict(text=('dog', 'car')))['text'] == 'dog. car.'


@pytest.mark.parametrize('prompts', [{'dog': 3}, {'dog': ' '}, {3: 'dog'}, ['dog']])
def test_what_is_no_word_is_told(text_dir: str, prompts: object) -> None:
    with pytest.raises(ConfigError, match='TokenSpans.prompts.*wheel bolt'):
        TokenSpans(text_dir, prompts=prompts)


@pytest.mark.parametrize('chunked_size', [-1, 1])
def test_a_detector_finds_what_the_words_find_under_the_category_names(
    text_dir: str, small_base: str, chunked_size: int
) -> None:
    detector = build(
        text_dir,
        base_checkpoint=small_base,
        **{**smallest_model(), 'test_cfg': dict(max_per_img=8, chunked_size=chunked_size)},
    ).eval()
    found = []
    for names, prompts in ((NAMES, PROMPTS), (('red star', 'dog', 'hot dog'), None)):
        (sample,) = data_samples(names, [1], size=32)
        sample.set_metainfo(TokenSpans(text_dir, prompts=prompts)(dict(text=names)))
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(detector.predict(torch.ones(1, 3, 32, 32), [sample])[0].pred_instances)
    ours, theirs = found
    assert torch.equal(ours.bboxes, theirs.bboxes) and torch.equal(ours.labels, theirs.labels)
    assert set(ours.label_names) <= {'cls 07', 'dog', 'cls 08'}


def test_image_demo_asks_for_the_words_of_a_category(
    things: Things, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    printed = []
    for text, prompts in (('wheel bolt', None), ('cls_07', {'cls_07': 'wheel bolt', 'x': 'dog'})):
        cfg = Config.fromfile(things.folder / 'my_things.py')
        for step in cfg.test_dataloader.dataset.pipeline:
            if step['type'] == 'TokenSpans':
                step['prompts'] = prompts
        cfg.dump(tmp_path / 'asked.py')
        capsys.readouterr()
        things.run(
            f'python tools/image_demo.py {tmp_path}/asked.py CHECKPOINT photo.jpg '
            f'--texts "{text}" --score-thr 0 --out {tmp_path}/out.jpg'
        )
        lines = [line for line in capsys.readouterr().out.splitlines() if '[' in line]
        printed.append([line.removeprefix(text) for line in lines])
    assert printed[0] == printed[1] != []

"""`FrozenFeaturesHook`: what a frozen encoder makes of the images is kept on disk."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.transforms import BaseTransform
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample
from mmengine.dataset import Compose
from mmengine.runner import Runner
from torch import Tensor, nn

from mmdet_gdino_lora import FrozenFeaturesHook
from mmdet_gdino_lora.engine.files import DiskFullError
from mmdet_gdino_lora.engine.replay import has_images
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.frozen import encode as encoding
from mmdet_gdino_lora.frozen import space
from mmdet_gdino_lora.frozen.encode import FrozenFeatures, encode
from mmdet_gdino_lora.frozen.pack import pack
from mmdet_gdino_lora.frozen.store import Encoding, Entry, Truth, View, read, write
from mmdet_gdino_lora.frozen.views import ViewPipeline
from tests.builders import build, data_samples
from tests.faults.smallest import model
from tests.frozen_run import (
    HOOK,
    META,
    NAMES,
    PIPELINE,
    config,
    images,
    run,
    train_as_rank,
)
from tests.processes import as_ranks
from tests.run_small import logged
from tests.tool_run import run_tool

EXACT = dict(HOOK, dtype='float32')
RESIZE = dict(type='Resize', scale=(48, 40))
PREPROCESSOR = dict(type='DetDataPreprocessor', mean=[0] * 3, std=[1] * 3)


def kept(folder: Path) -> dict[str, int]:
    """Files of features, with the time of their writing."""
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob('*.safetensors')}


@pytest.fixture
def detector(text_dir: str, small_base: str) -> nn.Module:
    return build(text_dir, base_checkpoint=small_base, **model()).train()


def batch(sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, list[DetDataSample]]:
    """Normalised images of several sizes in one padding, and their samples."""
    padded = (max(h for h, _ in sizes), max(w for _, w in sizes))
    inputs = torch.zeros(len(sizes), 3, *padded)
    samples = data_samples(NAMES, [2] * len(sizes), size=32)
    for image, sample, (height, width) in zip(inputs, samples, sizes):
        image[:, :height, :width] = torch.randn(3, height, width)
        sample.set_metainfo(dict(img_shape=(height, width), batch_input_shape=padded))
    return inputs, samples


def losses(detector: nn.Module, inputs: Tensor, samples: list) -> dict[str, Tensor]:
    torch.manual_seed(5)  # of the denoising queries
    return detector.loss(inputs, copy.deepcopy(samples))


def test_losses_and_gradients_from_kept_features_are_those_of_features_computed_anew(
    detector: nn.Module, tmp_path: Path
) -> None:
    inputs, samples = batch([(48, 40), (48, 40)])
    anew = losses(detector, inputs, samples)
    sum(anew.values()).backward()
    gradients = {n: p.grad for n, p in detector.named_parameters() if p.grad is not None}
    detector.zero_grad()

    for sample, path in zip(samples, ('a', 'b')):
        sample.set_metainfo(dict(missing_view=Entry(str(tmp_path / path), 'stamp')))
    detector.frozen_features = FrozenFeatures(torch.float32)
    losses(detector, inputs, samples)
    detector.frozen_features.settle()
    for sample, path in zip(samples, ('a', 'b')):
        view, truth = read(Entry(str(tmp_path / path), 'stamp'))
        torch.testing.assert_close(truth.bboxes, sample.gt_instances.bboxes)
        sample.set_field(view, 'kept_view')
    found = losses(detector, torch.zeros(2, 3, 1, 1), samples)
    sum(found.values()).backward()

    assert found.keys() == anew.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, anew[name], rtol=1e-6, atol=1e-6)
    for name, parameter in detector.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_queries_see_images_of_several_sizes_as_each_alone(detector: nn.Module) -> None:
    sizes = [(48, 40), (32, 64), (40, 40)]
    inputs, samples = batch(sizes)
    captions = detector.captions(samples)
    with torch.no_grad():
        views = [
            encode(detector, inputs[[n]], size, [[captions[n]]])[0] for n, size in enumerate(sizes)
        ]
        mask = detector.encode_text(captions)['text_token_mask']
        boxes, query = torch.rand(3, 8, 4), torch.randn(3, 8, 256)
        looks_at_images = detector.decoder.layers[0].cross_attn

        def seen(members: list[int]) -> Tensor:
            """What queries see of the images; mmdet's own position embedding knows the padding."""
            of_them = pack(detector, [views[n] for n in members], [mask[members]])[0]
            inputs = dict(of_them.decoder_inputs)
            ratios = inputs.pop('valid_ratios').repeat(1, 1, 2)
            return looks_at_images(
                query=query[members],
                value=of_them.outputs['memory'],
                key_padding_mask=inputs.pop('memory_mask'),
                reference_points=boxes[members][:, :, None] * ratios[:, None],
                **inputs,
            )

        together = seen([0, 1, 2])
        for number in range(3):
            alone = seen([number])
            torch.testing.assert_close(together[[number]], alone, rtol=1e-4, atol=1e-5)


def test_an_image_is_encoded_alone_whatever_padding_it_came_with(
    text_dir: str, small_base: str
) -> None:
    detector = build(text_dir, base_checkpoint=small_base, **model()).train()
    detector.data_preprocessor.pad_size_divisor = 32
    image, samples = torch.randn(1, 3, 40, 48), data_samples(NAMES, [1], size=40)
    captions = [detector.captions(samples)]
    views = []
    for padded in ((64, 64), (96, 128)):
        inputs = torch.zeros(1, 3, *padded)
        inputs[..., :40, :48] = image
        views += encode(detector, inputs, (40, 48), captions)
    first, second = views
    assert first.shapes == second.shapes == ((5, 6), (3, 3), (2, 2), (1, 1))
    torch.testing.assert_close(first.encodings[0].memory, second.encodings[0].memory)


def test_what_a_run_kept_is_read_by_the_next_one_of_another_seed(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    hook = dict(HOOK, folder=str(tmp_path / 'features'))
    run(tmp_path / 'first', text_dir, small_base, frozen=hook, epochs=8)
    before = kept(tmp_path / 'features')
    assert len(before) == 4
    assert '(2 of an image' in logged(tmp_path / 'first')
    second = config(tmp_path / 'second', text_dir, small_base, frozen=hook)
    second.randomness.seed = 99
    second.train_dataloader.num_workers = 1
    second.optim_wrapper.optimizer.lr = 1e-4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, 'encode', None)  # nothing is encoded but one image, to look at it
        Runner.from_cfg(second).train()
    assert kept(tmp_path / 'features') == before
    assert 'removed' not in logged(tmp_path)


def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    whole = run(tmp_path / 'whole', text_dir, small_base, epochs=4)
    run(tmp_path / 'parts', text_dir, small_base, epochs=2)
    written = kept(tmp_path / 'parts/frozen_features')
    parts = run(tmp_path / 'parts', text_dir, small_base, epochs=4, resume=True)
    assert written.items() <= kept(tmp_path / 'parts/frozen_features').items()
    weights = parts.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(weights[name], value), name


def test_a_loop_that_counts_iterations_reads_them_too(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    cfg = config(tmp_path / 'run', text_dir, small_base, by_epoch=False, epochs=4)
    cfg.custom_hooks = []  # without ResumableSeedHook the loop's own iterator stays
    Runner.from_cfg(cfg).train()
    assert kept(tmp_path / 'run/frozen_features')


def test_two_ranks_share_a_folder(text_dir: str, small_base: str, tmp_path: Path) -> None:
    images(tmp_path / 'images')
    as_ranks(train_as_rank, str(tmp_path / 'run'), text_dir, small_base)
    folder = tmp_path / 'run/frozen_features'
    assert 2 <= len(kept(folder)) <= 4
    assert not list(folder.rglob('*.partial'))


def test_retain_learns_the_same_from_kept_features(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    retain = dict(names=['bird', 'car'])
    detector = build(text_dir, base_checkpoint=small_base, retain=retain, **model()).train()
    with torch.no_grad():  # something is learned already
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    inputs, samples = batch([(48, 40), (48, 40)])
    anew = losses(detector, inputs, samples)
    detector.frozen_features = FrozenFeatures(torch.float32, detector.retention.fixed_caption)
    found = losses(detector, inputs, samples)
    assert found['loss_retain_ce'] > 1e-4
    for name, value in found.items():
        torch.testing.assert_close(value, anew[name], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------- what is read

small = st.integers(1, 4)


@settings(max_examples=25)
@given(shapes=st.lists(st.tuples(small, small), min_size=1, max_size=3), tokens=small, boxes=small)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32])
def test_a_view_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: torch.dtype,
    shapes: list[tuple[int, int]],
    tokens: int,
    boxes: int,
) -> None:
    size = sum(height * width for height, width in shapes)
    encodings = tuple(
        Encoding(torch.randn(size, 8).to(dtype), torch.randn(tokens, 8).to(dtype)) for _ in 'ab'
    )
    meta = dict(
        img_path='a.jpg', img_shape=(4, 5), scale_factor=(np.float64(0.5), 0.25), flip=False,
        flip_direction=None, homography_matrix=np.eye(3, dtype=np.float32),
    )  # fmt: skip
    truth = Truth(torch.rand(boxes, 4), torch.arange(boxes), meta)
    entry = Entry(str(tmp_path_factory.mktemp('views') / 'ab/view.safetensors'), 'stamp')
    write(entry, View(encodings, tuple(shapes)), truth)
    view, found = read(entry)
    assert view.shapes == tuple(shapes)
    for one, other in zip(view.encodings, encodings):
        assert torch.equal(one.memory, other.memory)
        assert torch.equal(one.memory_text, other.memory_text)
    assert torch.equal(found.bboxes, truth.bboxes) and torch.equal(found.labels, truth.labels)
    assert np.array_equal(found.metainfo.pop('homography_matrix'), meta.pop('homography_matrix'))
    assert found.metainfo == meta
    assert read(entry._replace(stamp='of another image')) is None


def test_half_a_file_is_none(tmp_path: Path) -> None:
    entry = Entry(str(tmp_path / 'view'), 'stamp')
    assert read(entry) is None
    view = View((Encoding(torch.ones(4, 8), torch.ones(2, 8)),), ((2, 2),))
    write(entry, view, Truth(torch.ones(1, 4), torch.ones(1), {}))
    Path(entry.path).write_bytes(Path(entry.path).read_bytes()[:-8])
    assert read(entry) is None


def test_a_full_disk_is_told_and_leaves_nothing_behind(
    detector: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_up(tensors: Any, path: str, metadata: Any) -> None:
        Path(path).write_bytes(b'half')
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr('mmdet_gdino_lora.frozen.store.save_file', fills_up)
    inputs, samples = batch([(48, 40)])
    samples[0].set_metainfo(dict(missing_view=Entry(str(tmp_path / 'view'), 'stamp')))
    features = FrozenFeatures(torch.float32, work_dir=str(tmp_path))
    features.of(detector, inputs, samples, detector.captions(samples))
    with pytest.raises(DiskFullError, match='features of an image could not be written'):
        features.settle()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_run_had_begun_to_write_goes_when_it_is_old(tmp_path: Path) -> None:
    (tmp_path / 'ab').mkdir()
    old, new = tmp_path / 'ab/.x.1.partial', tmp_path / 'ab/.x.2.partial'
    for path in (old, new):
        path.touch()
    os.utime(old, (0, 0))
    space.remove_unfinished(str(tmp_path))
    assert not old.exists() and new.exists()


def test_a_batch_without_images_is_not_written_for_replay() -> None:
    inputs, samples = batch([(8, 8), (8, 8)])
    assert has_images(dict(inputs=inputs, data_samples=samples))
    samples[1].set_field(View((), ()), 'kept_view')
    assert not has_images(dict(inputs=inputs, data_samples=samples))


# ------------------------------------------------------------------------------- what is made anew

OTHERS = {
    'other names': dict(dataset=dict(metainfo=dict(classes=NAMES[::-1]))),
    'another pipeline': dict(dataset=dict(pipeline=[*PIPELINE[:3], RESIZE, PIPELINE[-1]])),
    'another precision': dict(frozen=EXACT),
    'another model config': dict(data_preprocessor=PREPROCESSOR),
    'another base': {},
}


@pytest.fixture(scope='module')
def features(text_dir: str, small_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of one epoch has kept."""
    folder = tmp_path_factory.mktemp('features')
    run(folder / 'run', text_dir, small_base, epochs=1)
    return folder / 'run/frozen_features'


@pytest.mark.parametrize('other', OTHERS)
def test_features_of_another_recipe_are_removed_with_a_sentence(
    features: Path, text_dir: str, small_base: str, tmp_path: Path, other: str
) -> None:
    folder = tmp_path / 'run/frozen_features'
    shutil.copytree(features, folder)
    (folder / 'notes.safetensors').touch()
    before = kept(folder)
    if other == 'another base':
        content = torch.load(small_base)
        content['state_dict']['level_embed'] += 1
        small_base = str(tmp_path / 'other.pth')
        torch.save(content, small_base)
    run(tmp_path / 'run', text_dir, small_base, epochs=1, **copy.deepcopy(OTHERS[other]))
    assert f'holds features of {other}; they are removed' in logged(tmp_path)
    assert kept(folder).keys() & before.keys() == {'notes.safetensors'}


def test_images_whose_file_or_boxes_have_changed_are_encoded_anew(
    text_dir: str, small_base: str, tmp_path: Path
) -> None:
    hook = dict(HOOK, views=1)
    run(tmp_path / 'run', text_dir, small_base, epochs=1, frozen=hook)
    folder, root = tmp_path / 'run/frozen_features', tmp_path / 'images'
    before = kept(folder)
    cv2.imwrite(str(root / 'train/0.jpg'), np.zeros((64, 64, 3), np.uint8))
    content = json.loads((root / 'annotations/train.json').read_text())
    (box, *_) = [a['bbox'] for a in content['annotations'] if a['image_id'] == 1]
    box[2] += 1
    (root / 'annotations/train.json').write_text(json.dumps(content))
    run(tmp_path / 'run', text_dir, small_base, epochs=1, frozen=hook)
    after = kept(folder)
    assert after.keys() == before.keys()
    assert all(after[name] != before[name] for name in after)
    assert 'have changed since their features were kept' in logged(tmp_path)


# -------------------------------------------------------------------------------- what is refused

SPANS = dict(type='TokenSpans', tokenizer_name='TEXT', num_negatives=1)
PACK = dict(type='PackDetInputs')
WITH_SPANS = dict(PACK, meta_keys=(*META, 'text', 'tokens_positive', 'caption_tokens'))
WITH_ODD = dict(PACK, meta_keys=(*META, 'text', 'custom_entities', 'odd'))
RESIZED = dict(type='BatchSyncRandomResize', random_size_range=(32, 64))


@TRANSFORMS.register_module(force=True)
class OddTransform(BaseTransform):
    """Brings a value that is neither plain nor the caption's."""

    def transform(self, results: dict) -> dict:
        return dict(results, odd=object())


REFUSED = {
    'something in front of the decoder is trained': (
        dict(lora=dict(preset='encoder+decoder', r=2)),
        'encoder in front of the decoder would be trained',
    ),
    'a weight in front of the decoder is freed': (
        dict(trainable=['level_embed']),
        'level_embed in front of the decoder would be trained',
    ),
    'nothing is frozen': (dict(lora=None, check_adapters=False), 'has no adapters'),
    'sampled captions': (
        dict(dataset=dict(pipeline=[*PIPELINE[:-1], SPANS, WITH_SPANS])),
        'num_negatives draws the names',
    ),
    'retained names are drawn': (
        dict(retain=dict(names=[f'{a} {b}' for a in 'abcdefgh' for b in 'abcdefghijklmnop'])),
        'retain.names take more than one caption',
    ),
    'images are mixed behind the loader': (
        dict(data_preprocessor=dict(PREPROCESSOR, batch_augments=[RESIZED])),
        'batch_augments changes images',
    ),
    'values that are not plain': (
        dict(dataset=dict(pipeline=[*PIPELINE[:-1], dict(type='OddTransform'), WITH_ODD])),
        'meta_keys has .odd., whose value is of type object',
    ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_a_run_whose_features_are_not_fixed_is_refused(
    text_dir: str, small_base: str, tmp_path: Path, case: str
) -> None:
    settings, sentence = REFUSED[case]
    cfg = config(tmp_path / 'run', text_dir, small_base, **copy.deepcopy(settings))
    for step in cfg.train_dataloader.dataset.pipeline:
        if step['type'] == 'TokenSpans':
            step['tokenizer_name'] = text_dir
    with pytest.raises(ConfigError, match=sentence):
        Runner.from_cfg(cfg).train()


def test_images_that_are_mixed_are_refused(text_dir: str, small_base: str, tmp_path: Path) -> None:
    cfg = config(tmp_path / 'run', text_dir, small_base)
    mixed = dict(type='MultiImageMixDataset', dataset=cfg.train_dataloader.dataset, pipeline=[])
    cfg.train_dataloader.dataset = mixed
    with pytest.raises(ConfigError, match='MultiImageMixDataset, which mixes images'):
        Runner.from_cfg(cfg).train()


def test_a_disk_that_is_too_small_is_told_before_it_is_filled(
    text_dir: str, small_base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(space.shutil, 'disk_usage', lambda _: usage._replace(free=10_000))
    with pytest.raises(ConfigError, match='that disk has 0.0 GB left; choose fewer views'):
        run(tmp_path / 'run', text_dir, small_base)
    assert not kept(tmp_path / 'run/frozen_features')


def test_a_caption_that_differs_in_the_middle_of_a_run_ends_it(tmp_path: Path) -> None:
    packed = dict(data_samples=DetDataSample(metainfo=dict(text='dog.', img_path='a.jpg')))
    pipeline = ViewPipeline(
        Compose([lambda _: packed]),
        views=1,
        folder=str(tmp_path),
        recipe='',
        caption=dict(text='cat.'),
    )
    with pytest.raises(ConfigError, match=r"captions of these images differ \('dog.' of a.jpg"):
        pipeline(dict(img_path=__file__))


def test_the_command_line_alone_turns_it_on(text_dir: str, small_base: str, tmp_path: Path) -> None:
    cfg = config(tmp_path / 'run', text_dir, small_base, frozen=None, epochs=1)
    cfg.launcher = 'none'
    cfg.dump(tmp_path / 'things.py')
    key = 'default_hooks.frozen_features'
    options = f'{key}.type=FrozenFeaturesHook {key}.views=1 {key}.folder=features'
    run_tool(f'python tools/train.py things.py --cfg-options {options}', tmp_path)
    assert len(kept(tmp_path / 'features')) == 2


@pytest.mark.parametrize('settings', [dict(views=0), dict(views=True), dict(dtype='float16')])
def test_values_that_can_not_be_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match='FrozenFeaturesHook'):
        FrozenFeaturesHook(**settings)

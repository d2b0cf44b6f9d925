"""An exported file finds what the tuned detector finds, wherever onnxruntime is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mmcv
import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.export import onnx_file
from mmdet_gdino_lora.export.graph import FixedNames, TextInput
from mmdet_gdino_lora.export.layers import GRAPH
from mmdet_gdino_lora.export.onnx_file import describe, differences, example, write_onnx
from mmdet_gdino_lora.export.onnx_runner import CaptionMaker, OnnxDetector, resized
from mmdet_gdino_lora.export.plain import plain_detector
from mmdet_gdino_lora.lora.store.merge import merged_weights
from tests.builders import build, build_cfg, data_samples, detector_cfg
from tests.tool_run import Things

ROOT = Path(__file__).parent.parent
RUNNER = ROOT / 'mmdet_gdino_lora/export/onnx_runner.py'
NAMES = ['red star', 'dog', 'hot dog']
PIXELS, SCORES = 1e-3, 1e-4


class Exported(NamedTuple):
    """A tuned detector, its graph, and the file."""

    tuned: nn.Module
    graph: Any
    path: str
    names: Sequence[str]


def tuned_by_chance(detector: nn.Module) -> nn.Module:
    """Moves what an adapter trains off its beginning, where it does nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.01)
    return detector.eval()


def export(config: Any, path: Path, names: Sequence[str], text: bool, pipeline: Any) -> Exported:
    torch.manual_seed(0)
    tuned = build_cfg(config)
    if not config.get('base_checkpoint'):
        tuned.init_weights()
        # Random features are so alike or unlike that scores would be 0 and 1, without an order.
        nn.init.constant_(tuned.decoder.norm.weight, 0.1)
    tuned = tuned_by_chance(tuned)
    plain = plain_detector(config, merged_weights(tuned))
    graph = TextInput(plain) if text else FixedNames(plain, names)
    write_onnx(str(path), graph, describe(plain, names, pipeline, 0.01, text))
    return Exported(tuned, graph, str(path), names)


@pytest.fixture(scope='module')
def demo(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo's model with fixed names."""
    cfg = Config.fromfile(ROOT / 'configs/gdino_lora_shapes.py')
    path = tmp_path_factory.mktemp('demo') / 'fixed.onnx'
    return export(cfg.model, path, cfg.metainfo.classes, False, cfg.test_pipeline)


@pytest.fixture(scope='module')
def demo_text(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The demo's model with text as input."""
    cfg = Config.fromfile(ROOT / 'configs/gdino_lora_shapes.py')
    path = tmp_path_factory.mktemp('demo') / 'text.onnx'
    return export(cfg.model, path, cfg.metainfo.classes, True, cfg.test_pipeline)


@pytest.fixture(scope='module')
def swin(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A Swin-T of random weights: its widths, windows and heads, fewer layers and queries."""
    cfg = detector_cfg(text_dir, num_queries=40, lora=dict(preset=['backbone', 'decoder'], r=4))
    cfg.backbone.update(embed_dims=96, depths=[2, 2, 2, 2], num_heads=[3, 6, 12, 24])
    cfg.neck.in_channels = [192, 384, 768]
    cfg.encoder.num_layers = 1
    cfg.bbox_head.contrastive_cfg = dict(max_text_len=256)
    path = tmp_path_factory.mktemp('swin') / 'fixed.onnx'
    return export(cfg, path, NAMES, False, [])


def picture(height: int, width: int) -> np.ndarray:
    """A smooth random image, [H, W, 3] uint8."""
    noise = np.random.default_rng(1).integers(0, 255, (7, 9, 3), dtype=np.uint8)
    return mmcv.imresize(noise, (width, height))


def detected(exported: Exported, image: np.ndarray, scale: int) -> Any:
    """What the tuned detector finds, through mmdet's own resizing and normalising."""
    resized_image = mmcv.imrescale(image[:, :, ::-1], (scale, scale))
    sample = data_samples(exported.names, [0])[0]
    shape = resized_image.shape[:2]
    sample.set_metainfo(
        dict(
            img_shape=shape,
            ori_shape=image.shape[:2],
            scale_factor=(shape[1] / image.shape[1], shape[0] / image.shape[0]),
        )
    )
    pixels = torch.from_numpy(np.ascontiguousarray(resized_image.transpose(2, 0, 1)))
    data = exported.tuned.data_preprocessor(dict(inputs=[pixels], data_samples=[sample]))
    with torch.no_grad():
        (result,) = exported.tuned.predict(data['inputs'], data['data_samples'])
    return result.pred_instances


def assert_same(found: Any, wanted: Any) -> None:
    kept = wanted.scores.numpy() >= 0.01
    assert kept.sum() >= 10
    np.testing.assert_allclose(found.boxes, wanted.bboxes.numpy()[kept], atol=PIXELS, rtol=0)
    np.testing.assert_allclose(found.scores, wanted.scores.numpy()[kept], atol=SCORES, rtol=0)
    assert found.labels.tolist() == wanted.labels[torch.from_numpy(kept)].tolist()
    assert [found.names[label] for label in found.labels] == np.array(wanted.label_names)[
        kept
    ].tolist()


@pytest.mark.parametrize('which', ['demo', 'demo_text'])
def test_the_runner_finds_what_the_tuned_detector_finds(
    which: str, request: pytest.FixtureRequest
) -> None:
    exported = request.getfixturevalue(which)
    runner = OnnxDetector(exported.path)
    assert runner.classes == tuple(exported.names)
    for height, width in ((100, 150), (131, 96)):
        image = picture(height, width)
        assert_same(runner(image), detected(exported, image, 128))


@pytest.mark.parametrize('which', ['demo', 'demo_text', 'swin'])
def test_one_file_takes_images_and_batches_of_any_size(
    which: str, request: pytest.FixtureRequest
) -> None:
    exported = request.getfixturevalue(which)
    for height, width, batch in ((96, 97, 1), (131, 163, 3)):
        inputs = example(exported.graph, height, width, batch)
        found = differences(exported.path, exported.graph, inputs)
        assert found.pop('boxes') < PIXELS
        assert found.pop('labels', 0.0) == 0
        assert all(value < SCORES for value in found.values())


def test_swins_layers_compute_in_a_graph_what_they_compute_in_training(swin: Exported) -> None:
    for size in ((96, 160), (131, 163)):  # whole windows, and what has to be padded everywhere
        pixels = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(2)) * 255
        samples = data_samples(NAMES, [0, 0])
        for sample in samples:
            sample.set_metainfo(dict(img_shape=size, batch_input_shape=size))
        preprocessor = swin.tuned.data_preprocessor
        with torch.no_grad():
            images = (pixels - preprocessor.mean) / preprocessor.std
            wanted = swin.tuned.predict(images, samples)
            boxes, scores, labels = swin.graph(pixels)
        for number, sample in enumerate(wanted):
            instances = sample.pred_instances
            torch.testing.assert_close(boxes[number], instances.bboxes, atol=PIXELS, rtol=0)
            torch.testing.assert_close(scores[number], instances.scores, atol=SCORES, rtol=0)
            assert torch.equal(labels[number], instances.labels)
    assert set(GRAPH.values()) <= set(map(type, swin.graph.modules()))


def test_a_batch_may_have_a_caption_for_each_image(demo_text: Exported) -> None:
    images = example(demo_text.graph, 96, 128)[0]
    tokenizer = demo_text.tuned.language_model.caption_tokenizer
    captions = [tokenizer.from_names(names) for names in (['a', 'b'], ['c'])]
    two = [onnx_file.text_inputs(caption) for caption in captions]
    padded = [_padded(longer, shorter) for longer, shorter in zip(*two)]
    found = differences(demo_text.path, demo_text.graph, (images, *padded))
    assert max(found.values()) < PIXELS
    with torch.no_grad():
        logits, boxes = demo_text.graph(images, *padded)
        text = demo_text.graph.detector.encode_text(captions)
        wanted_logits, wanted_boxes = demo_text.graph.detect(images, text)
    torch.testing.assert_close(boxes, wanted_boxes, atol=PIXELS, rtol=0)
    torch.testing.assert_close(logits, wanted_logits, atol=SCORES, rtol=0)
    assert (logits[1, :, captions[1].num_tokens :] == -torch.inf).all()


def _padded(longer: Tensor, shorter: Tensor) -> Tensor:
    """Two captions in one tensor; a padding token sees itself alone."""
    missing = longer.shape[-1] - shorter.shape[-1]
    pad = [0, missing] * (shorter.dim() - 1)
    shorter = nn.functional.pad(shorter, pad)
    if shorter.dim() == 3:
        shorter = shorter | torch.eye(shorter.shape[-1], dtype=torch.bool)
    return torch.cat((longer, shorter))


def test_the_file_says_what_it_needs_and_samples_by_onnxs_own_operator(demo: Exported) -> None:
    model = onnx.load(demo.path)
    operators = Counter(node.op_type for node in model.graph.node)
    assert operators['GridSample'] == 3 * (2 + 3)  # levels, encoder and decoder layers
    assert {entry.domain for entry in model.opset_import} == {''}
    sizes = {
        entry.name: [d.dim_param or d.dim_value for d in entry.type.tensor_type.shape.dim]
        for entry in model.graph.input
    }
    assert sizes == dict(images=['batch', 3, 'height', 'width'])
    said = {entry.key: entry.value for entry in model.metadata_props}
    assert said['format'] == onnx_file.FORMAT and said['task'] == 'classes'
    assert json.loads(said['classes']) == list(demo.names)
    assert json.loads(said['max_per_img']) == 60
    image = json.loads(said['image'])
    assert image['color'] == 'RGB' and image['range'] == [0, 255]
    assert image['normalized_inside']['mean'] == pytest.approx([123.675, 116.28, 103.53])
    assert image['resize']['scale'] == [128, 128] and image['resize']['keep_ratio']


@pytest.mark.parametrize('most', [0, 2])
def test_the_runners_captions_are_the_detectors(minilm: str, most: int) -> None:
    detector = build(minilm, lora=None, test_cfg=dict(max_per_img=30, chunked_size=most))
    meta = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in describe(detector, (), [], 0.3, True).items()
    }
    names = ['traffic_light', 'cell phone (old)', 'U.S. flag', "child's toy", 'what? box', 'Ärmel']
    names += [f'thing of sort {number}' for number in range(80)]
    tokenizer = detector.language_model.caption_tokenizer
    wanted = tokenizer.in_chunks(names, chunk_size=most)
    made = CaptionMaker(meta)(names)
    assert len(made) == len(wanted) > 1
    for ours, theirs in zip(made, wanted):
        inputs = CaptionMaker(meta).inputs(ours)
        for array, tensor in zip(inputs.values(), onnx_file.text_inputs(theirs)):
            np.testing.assert_array_equal(array, tensor.numpy())
        assert list(ours.spans) == [theirs.token_spans[label] for label in theirs.labels]


def test_the_runner_needs_neither_torch_nor_this_package(demo: Exported, tmp_path: Path) -> None:
    copy = tmp_path / 'onnx_runner.py'
    copy.write_text(RUNNER.read_text())
    mmcv.imwrite(picture(100, 150), str(tmp_path / 'photo.png'))
    blocked = ('torch', 'mmdet', 'mmcv', 'mmengine', 'transformers', 'mmdet_gdino_lora')
    code = (
        'import sys, runpy\n'
        f'sys.modules.update(dict.fromkeys({blocked!r}))\n'
        f'sys.argv = ["onnx_runner.py", {demo.path!r}, "photo.png", "--score-thr", "0"]\n'
        'runpy.run_path("onnx_runner.py", run_name="__main__")'
    )
    said = subprocess.run(
        [sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert len(said) == 60
    assert said[0].split('  ')[0] in demo.names


def test_sizes_are_mmdets() -> None:
    rule = dict(scale=[1333, 800], keep_ratio=True, rounds_down=False)
    for width, height in ((640, 480), (333, 500), (1920, 1080), (501, 499)):
        wanted = mmcv.rescale_size((width, height), (1333, 800))
        assert resized(width, height, rule) == wanted
    assert resized(333, 501, dict(rule, keep_ratio=False)) == (1333, 800)


def test_what_cannot_be_a_graph_is_told(
    text_dir: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = build(text_dir, lora=None, dn_cfg=None)
    with pytest.raises(ConfigError, match='5 class names take 3 captions.*chunked_size=2.*--text'):
        detector.test_cfg['chunked_size'] = 2
        FixedNames(detector, ['a', 'b', 'c', 'd', 'e'])
    monkeypatch.setattr(onnx_file, 'LARGEST', 1000)
    with pytest.raises(ConfigError, match='GiB of weights'):
        write_onnx(str(tmp_path / 'm.onnx'), TextInput(detector), {})
    monkeypatch.setitem(sys.modules, 'onnx', None)
    with pytest.raises(ConfigError, match='pip install onnx onnxruntime'):
        write_onnx(str(tmp_path / 'm.onnx'), TextInput(detector), {})
    assert not list(tmp_path.iterdir())


def test_the_tool_writes_a_file_of_a_run(
    things: Things, capsys: pytest.CaptureFixture[str]
) -> None:
    things.run('python tools/export_onnx.py my_things.py CHECKPOINT out.onnx')
    assert 'boxes, scores, labels' in capsys.readouterr().out
    said = {e.key: e.value for e in onnx.load(things.folder / 'out.onnx').metadata_props}
    assert json.loads(said['classes']) == ['wheel bolt', 'cracked tile']

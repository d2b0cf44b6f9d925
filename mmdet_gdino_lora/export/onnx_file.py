"""Graphs as ONNX files that say themselves how they are used.

torch has two exporters. The one that traces (``dynamo=False``) is the one used: its graphs take
images and batches of any size as they are written here, and it needs no package beside torch.
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor

from mmdet_gdino_lora.engine.atomic import atomic
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.export.graph import FixedNames, TextInput
from mmdet_gdino_lora.text.tokens import TokenizedCaption
from mmdet_gdino_lora.transformer import LeanGroundingDINO

FORMAT = 'mmdet_gdino_lora/1'
OPSET = 17
"""ONNX's operators: ``GridSample`` came with 16, ``LayerNormalization`` with 17."""

LARGEST = 2**31
"""Bytes that a file of protobuf's can have at most."""

_AXES = {
    'images': {0: 'batch', 2: 'height', 3: 'width'},
    'input_ids': {0: 'captions', 1: 'tokens'},
    'attention_mask': {0: 'captions', 1: 'tokens', 2: 'tokens'},
    'position_ids': {0: 'captions', 1: 'tokens'},
    'text_token_mask': {0: 'captions', 1: 'tokens'},
    'boxes': {0: 'batch'},
    'scores': {0: 'batch'},
    'labels': {0: 'batch'},
    'logits': {0: 'batch', 2: 'tokens'},
}
Graph = Union[FixedNames, TextInput]


def package(name: str) -> Any:
    """Imports a package that only the export needs.

    Args:
        name: ``onnx`` or ``onnxruntime``.

    Returns:
        The module.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name} can't be imported ({error}), and the export to ONNX needs it: pip install "
            'onnx onnxruntime'
        ) from error


def write_onnx(path: str, graph: Graph, metadata: Mapping[str, Any]) -> None:
    """Writes a graph.

    Args:
        path: Of the file.
        graph: Its inputs and outputs are said in the graph's ``forward``.
        metadata: Goes into the file's ``metadata_props``: strings as they are, the rest as JSON.

    Raises:
        ConfigError: onnx is missing, or the model too large for one file.
    """
    onnx = package('onnx')
    size = sum(tensor.nbytes for tensor in graph.state_dict().values())
    if size >= LARGEST:
        raise ConfigError(
            f'{path}: the model has {size / 2**30:.1f} GiB of weights, and an ONNX file holds less '
            'than 2; export a smaller model.'
        )
    with atomic(path) as partial:
        with warnings.catch_warnings():
            # Of the tracer's: comparisons in Python that hold for every size, and its own age.
            warnings.simplefilter('ignore')
            torch.onnx.export(
                graph,
                example(graph),
                partial,
                dynamo=False,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                dynamic_axes={name: _AXES[name] for name in (*graph.inputs, *graph.outputs)},
                opset_version=OPSET,
            )
        model = onnx.load(partial)
        for key, value in metadata.items():
            text = value if isinstance(value, str) else json.dumps(value)
            model.metadata_props.add(key=key, value=text)
        onnx.save(model, partial)


def example(graph: Graph, height: int = 0, width: int = 0, batch: int = 2) -> tuple[Tensor, ...]:
    """Makes inputs of a graph: noise and, where text is an input, a caption.

    Args:
        graph: As it is exported.
        height: Of the images; 0: one that has positions enough for the queries.
        width: As ``height``.
        batch: Number of images.

    Returns:
        In the order of the graph's inputs.
    """
    side = smallest_side(graph.detector.num_queries)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, height or side, width or side + 32, generator=generator) * 255
    if isinstance(graph, FixedNames):
        return (images,)
    tokenizer = graph.detector.language_model.caption_tokenizer
    names = ['a', 'b a', 'c']
    caption = tokenizer.from_names(names)
    if caption.num_tokens == graph.detector.num_queries:
        # mmcv's attention adds the queries' positions to keys that are as many: see docs/export.md
        caption = tokenizer.from_names([*names, 'd'])
    return images, *text_inputs(caption)


def text_inputs(caption: TokenizedCaption) -> tuple[Tensor, ...]:
    """Makes a graph's inputs of a caption.

    Args:
        caption: As the text encoder's tokenizer makes it.

    Returns:
        Token ids, attention mask, position ids and token mask, of one caption.
    """
    ids, segments = torch.from_numpy(caption.input_ids), torch.from_numpy(caption.segment_ids)
    positions = torch.from_numpy(caption.position_ids)
    return (
        ids.long()[None],
        (segments[:, None] == segments)[None],
        positions.long()[None],
        torch.ones(1, len(ids), dtype=torch.bool),
    )


def smallest_side(num_queries: int) -> int:
    """Finds how large a square image at least is that surely has a position for each query.

    The finest level has one per 8 x 8 pixels.

    Args:
        num_queries: Of the detector.

    Returns:
        Pixels, a multiple of 32.
    """
    return 32 * -(-int(8 * num_queries**0.5 + 1) // 32)


def describe(
    detector: LeanGroundingDINO,
    classes: Sequence[str],
    pipeline: Sequence[Mapping[str, Any]],
    score_threshold: float,
    tokenizer: bool,
) -> dict[str, Any]:
    """Says how a graph is used, for its metadata.

    Args:
        detector: Plain.
        classes: Class names; of a graph with text as input, those it was tuned on.
        pipeline: Transforms of the test data, for the size of the images.
        score_threshold: Below which a detection is not worth showing.
        tokenizer: Whether the tokenizer is put in, for graphs with text as input.

    Returns:
        Values by key.
    """
    preprocessor = detector.data_preprocessor
    normalises = preprocessor._enable_normalize
    values: dict[str, Any] = dict(
        format=FORMAT,
        task='text' if tokenizer else 'classes',
        classes=list(classes),
        score_threshold=score_threshold,
        max_per_img=detector.bbox_head.test_cfg.get('max_per_img', detector.num_queries),
        num_queries=detector.num_queries,
        image=dict(
            color='RGB' if preprocessor._channel_conversion else 'BGR',
            layout='NCHW',
            range=[0, 255],
            normalized_inside=dict(
                mean=preprocessor.mean.flatten().tolist() if normalises else [0.0] * 3,
                std=preprocessor.std.flatten().tolist() if normalises else [1.0] * 3,
            ),
            resize=_resize(pipeline),
        ),
    )
    if tokenizer:
        captions = detector.language_model.caption_tokenizer
        values.update(
            tokenizer=captions.tokenizer.backend_tokenizer.to_str(),
            max_tokens=captions.max_tokens,
            special_token_ids=sorted(captions.special_ids),
            chunked_size=max(0, detector.test_cfg.get('chunked_size', 0)),
        )
    return values


def _resize(pipeline: Sequence[Mapping[str, Any]]) -> Optional[dict[str, Any]]:
    """What the pipeline does to the size of images; None where it leaves it."""
    for step in pipeline:
        if step['type'] in ('Resize', 'FixScaleResize') and step.get('scale'):
            scale = step['scale']
            return dict(
                scale=[scale, scale] if isinstance(scale, int) else list(scale),
                keep_ratio=bool(step.get('keep_ratio')),
                rounds_down=step['type'] == 'FixScaleResize',
                backend=step.get('backend', 'cv2'),
            )
    return None


def differences(path: str, graph: Graph, inputs: Sequence[Tensor]) -> dict[str, float]:
    """Compares a file's outputs, by onnxruntime on the CPU, with the graph's by PyTorch.

    Args:
        path: Of the file.
        graph: That it was made of.
        inputs: As of :func:`example`.

    Returns:
        The largest difference per output: boxes in pixels, the share of labels that differ.

    Raises:
        ConfigError: onnxruntime is missing.
    """
    runtime = package('onnxruntime')
    session = runtime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [entry.name for entry in session.get_inputs()]
    given = {n: t.numpy() for n, t in zip(graph.inputs, inputs) if n in names}
    theirs = session.run(list(graph.outputs), given)
    with torch.no_grad():
        ours = graph(*inputs)
    return {name: _largest(a, b.numpy()) for name, a, b in zip(graph.outputs, theirs, ours)}


def _largest(a: np.ndarray, b: np.ndarray) -> float:
    if a.dtype == np.int64:
        return float((a != b).mean())
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)):
        return float('inf')
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0))

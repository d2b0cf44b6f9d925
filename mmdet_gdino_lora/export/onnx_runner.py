"""Runs an exported ONNX file with numpy, onnxruntime and an image library, and nothing else.

This file needs no other file of the project: copy it to where the model runs. Text as input needs
the package ``tokenizers`` as well.

    python onnx_runner.py model.onnx photo.jpg
    python onnx_runner.py model.onnx photo.jpg --names "wheel bolt . cracked tile"

It is also the reference for other languages: what it does is all that has to be done.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import numpy as np
import onnxruntime


class Detections(NamedTuple):
    """What was found in an image, best first.

    Attributes:
        boxes: [N, 4] float32, (x1, y1, x2, y2) in the pixels of the image that was given.
        scores: [N] float32, 0..1.
        labels: [N] int64, index into ``names``.
        names: Class names.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]


class Caption(NamedTuple):
    """A caption as the model reads it.

    Attributes:
        input_ids: [T] int64.
        segments: [T] int64; tokens of one segment see each other.
        position_ids: [T] int64, position within the segment.
        spans: Per class, the places of its tokens.
    """

    input_ids: np.ndarray
    segments: np.ndarray
    position_ids: np.ndarray
    spans: tuple[tuple[int, ...], ...]


class OnnxDetector:
    """A tuned Grounding DINO in one ONNX file.

    Args:
        path: Of the file.
        providers: onnxruntime's; by default those of the installed package.
        options: onnxruntime's ``SessionOptions``.
    """

    def __init__(
        self, path: str, providers: Optional[Sequence[str]] = None, options: Any = None
    ) -> None:
        self.session = onnxruntime.InferenceSession(
            path, options, providers=providers or onnxruntime.get_available_providers()
        )
        self.meta = dict(self.session.get_modelmeta().custom_metadata_map)
        self.task = self.meta['task']
        self.classes = tuple(json.loads(self.meta['classes']))
        self.image = json.loads(self.meta['image'])
        if self.task == 'text':
            self.captions = CaptionMaker(self.meta)

    def __call__(
        self,
        image: np.ndarray,
        names: Optional[Sequence[str]] = None,
        score_threshold: Optional[float] = None,
    ) -> Detections:
        """Detects.

        Args:
            image: [H, W, 3] uint8, RGB.
            names: What to look for, where text is an input; by default the classes that the model
                was tuned on.
            score_threshold: Below which nothing is returned; by default the file's.

        Returns:
            Detections in the image's pixels.
        """
        pixels = self.prepare(image)
        if self.task == 'text':
            names = self.classes if names is None else tuple(names)
            boxes, scores, labels = self._ground(pixels, names)
        else:
            if names is not None:
                raise ValueError(f'this model detects {self.classes}; it takes no other names')
            names = self.classes
            boxes, scores, labels = (out[0] for out in self.session.run(None, dict(images=pixels)))
        if score_threshold is None:
            score_threshold = float(self.meta['score_threshold'])
        kept = scores >= score_threshold
        ratio = np.array([image.shape[1] / pixels.shape[3], image.shape[0] / pixels.shape[2]])
        boxes = boxes[kept] * np.tile(ratio, 2).astype(np.float32)
        return Detections(boxes, scores[kept], labels[kept], tuple(names))

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Resizes an image and puts it into the model's form.

        Args:
            image: [H, W, 3] uint8, RGB.

        Returns:
            [1, 3, H, W] float32, 0..255; the graph normalises it.
        """
        rule = self.image['resize']
        if rule:
            size = resized(image.shape[1], image.shape[0], rule)
            if size != (image.shape[1], image.shape[0]):
                image = resize(image, size, rule['backend'])
        if self.image['color'] == 'BGR':
            image = image[:, :, ::-1]
        return np.ascontiguousarray(image.transpose(2, 0, 1)[None], dtype=np.float32)

    def _ground(self, pixels: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, ...]:
        """Detects what the names say, in as many captions as they take."""
        found, first = [], 0
        for caption in self.captions(names):
            logits, boxes = self.session.run(
                ['logits', 'boxes'], dict(self.captions.inputs(caption), images=pixels)
            )
            tokens = 1 / (1 + np.exp(-logits[0]))
            scores = np.stack([tokens[:, list(span)].mean(1) for span in caption.spans], 1)
            labels = np.broadcast_to(first + np.arange(len(caption.spans)), scores.shape)
            repeated = boxes[0].repeat(len(caption.spans), 0)
            found.append((repeated, scores.ravel(), labels.ravel()))
            first += len(caption.spans)
        boxes, scores, labels = (np.concatenate(parts) for parts in zip(*found))
        best = np.argsort(-scores, kind='stable')[: int(self.meta['max_per_img'])]
        size = np.array([pixels.shape[3], pixels.shape[2]] * 2, dtype=np.float32)
        return boxes[best].clip(0, size), scores[best], labels[best]


class CaptionMaker:
    """Makes captions of class names: ``[CLS] wheel bolt . cracked tile . [SEP]``.

    Args:
        meta: The file's metadata.
    """

    def __init__(self, meta: dict) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_str(meta['tokenizer'])
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._special = json.loads(meta['special_token_ids'])
        self._room = int(meta['max_tokens']) - 2
        self._most = int(meta['chunked_size'])
        self._ends = self._tokenizer.encode('').ids

    def __call__(self, names: Sequence[str]) -> list[Caption]:
        """Makes as many captions as the names take.

        Args:
            names: Class names.

        Returns:
            The captions.
        """
        if not names:
            raise ValueError('no names: say what to look for')
        parts: list[list[tuple[list[int], list[int]]]] = [[]]
        used = 0
        for name in names:
            ids, tokens = self._piece(name)
            full = used + len(ids) > self._room or 0 < self._most == len(parts[-1])
            if parts[-1] and full:
                parts.append([])
                used = 0
            parts[-1].append((ids, tokens))
            used += len(ids)
        return [self._caption(pieces) for pieces in parts]

    def inputs(self, caption: Caption) -> dict[str, np.ndarray]:
        """Puts a caption into the graph's inputs.

        Args:
            caption: To look for.

        Returns:
            Arrays of one caption by name.
        """
        return dict(
            input_ids=caption.input_ids[None],
            attention_mask=(caption.segments[:, None] == caption.segments)[None],
            position_ids=caption.position_ids[None],
            text_token_mask=np.ones((1, len(caption.input_ids)), dtype=bool),
        )

    def _piece(self, name: str) -> tuple[list[int], list[int]]:
        """The ids of a name and the dot behind it, and which of them are the name's own."""
        name = re.sub(r'\(.*\)', '', name).replace('_', ' ').replace('  ', ' ')
        encoded = self._tokenizer.encode(f'{name}. ', add_special_tokens=False)
        tokens = [i for i, (begin, _) in enumerate(encoded.offsets) if begin < len(name)]
        if not tokens or len(encoded.ids) > self._room:
            raise ValueError(f'the name {name!r} has no token, or too many for a caption')
        return encoded.ids, tokens

    def _caption(self, pieces: Sequence[tuple[list[int], list[int]]]) -> Caption:
        ids, spans = [self._ends[0]], []
        for piece, tokens in pieces:
            spans.append(tuple(len(ids) + token for token in tokens))
            ids += piece
        input_ids = np.array([*ids, self._ends[-1]], dtype=np.int64)
        # A special token ([CLS], [SEP], '.', '?') ends a segment, in which positions begin anew.
        starts = np.concatenate([[True], np.isin(input_ids, self._special)[:-1]])
        starts[-1] = True
        segments = np.cumsum(starts) - 1
        positions = np.arange(len(input_ids)) - np.flatnonzero(starts)[segments]
        return Caption(input_ids, segments, positions, tuple(spans))


def resized(width: int, height: int, rule: dict) -> tuple[int, int]:
    """Computes the size that an image is brought to.

    Args:
        width: Of the image.
        height: Of the image.
        rule: ``scale``: one side is at most the longer of its numbers, the other at most the
            shorter; ``keep_ratio``, ``rounds_down``.

    Returns:
        Width and height.
    """
    scale = rule['scale']
    if not rule['keep_ratio']:
        return int(scale[0]), int(scale[1])
    ratio = min(max(scale) / max(width, height), min(scale) / min(width, height))
    half = 0 if rule['rounds_down'] else 0.5
    return int(width * ratio + half), int(height * ratio + half)


def resize(image: np.ndarray, size: tuple[int, int], backend: str) -> np.ndarray:
    """Resizes an image as the training did.

    Args:
        image: [H, W, 3] uint8.
        size: Width and height.
        backend: ``cv2`` or ``pillow``.

    Returns:
        The image, bilinearly resized.
    """
    if backend == 'pillow':
        from PIL import Image

        return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    import cv2

    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def read_image(path: str) -> np.ndarray:
    """Reads an image.

    Args:
        path: Of the file.

    Returns:
        [H, W, 3] uint8, RGB.
    """
    try:
        import cv2
    except ImportError:
        from PIL import Image

        return np.asarray(Image.open(path).convert('RGB'))
    image = cv2.imread(path)
    if image is None:
        raise FileNotFoundError(f'{path}: no image there that OpenCV can read')
    return image[:, :, ::-1]


def main() -> None:
    """Command line."""
    arguments = argparse.ArgumentParser(description='Detect with an exported model')
    arguments.add_argument('model', help='ONNX file')
    arguments.add_argument('image', help='image file')
    arguments.add_argument('--names', help='what to look for, with " . " between the names')
    arguments.add_argument('--score-thr', type=float, help="default: the file's")
    args = arguments.parse_args()
    names = args.names and [name.strip() for name in args.names.split(' . ') if name.strip()]
    found = OnnxDetector(args.model)(read_image(args.image), names, args.score_thr)
    for box, score, label in zip(found.boxes, found.scores, found.labels):
        corners = ' '.join(f'{value:.1f}' for value in box)
        print(f'{found.names[label]}  {score:.3f}  {corners}')


if __name__ == '__main__':
    main()

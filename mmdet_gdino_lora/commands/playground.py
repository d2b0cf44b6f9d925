"""Serves a page to try a tuned detector on: a photo, names, and how strong the adapter is.

playground.py CONFIG CHECKPOINT [--thresholds WORK_DIR/thresholds.json] [--port 7860]

The page is for this machine alone unless --host says otherwise, and asks nothing of the network.
Photos are gone from the disk when it ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Optional

from mmdet_gdino_lora.commands.common import config_file, read_arguments
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.shipped import typed_config

if TYPE_CHECKING:
    from mmcv.transforms import Compose

    from mmdet_gdino_lora.playground.page import Answer


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Command line.

    Args:
        argv: Arguments; None: the process's own.
    """
    args = read_arguments(own_parser(), argv)

    from mmdet_gdino_lora.checks.walk import datasets_of
    from mmdet_gdino_lora.commands.image_demo import load
    from mmdet_gdino_lora.commands.thresholds import read_scores
    from mmdet_gdino_lora.playground.page import need_gradio, serving

    need_gradio()
    config = typed_config(args.config)
    if not os.path.isfile(config):
        raise ConfigError(f'config {config!r}: no such file')
    cfg = config_file(config)
    if not cfg.model.get('lora'):
        raise ConfigError('the config sets no model.lora, so that there is no strength to move')
    scores = {} if args.thresholds is None else read_scores(args.thresholds)
    detector, pipeline = load(cfg, args.checkpoint, args.device)
    tested = [dataset for _, dataset in datasets_of('test_dataloader', cfg.test_dataloader)]
    names = [n for dataset in tested for n in (dataset.get('metainfo') or {}).get('classes') or ()]
    # Ctrl-C ends it, and so does what ends a service: photos are removed in both cases.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with serving(Trial(detector, pipeline, scores), names, args.host, args.port) as url:
        print(f'open {url} in a browser; Ctrl-C ends it', flush=True)
        if args.host not in ('127.0.0.1', 'localhost'):
            print(f'--host {args.host}: whoever reaches this machine can use the page', flush=True)
        try:
            while True:
                signal.pause()
        except KeyboardInterrupt:
            print()


def own_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    arguments = argparse.ArgumentParser(
        description='Serve a page to try a tuned detector on: a photo, names, the strength'
    )
    arguments.add_argument('config', help='config file')
    arguments.add_argument('checkpoint', help='checkpoint file, or adapter folder')
    arguments.add_argument(
        '--thresholds', help="a report's thresholds.json: the lowest score of each class in it"
    )
    arguments.add_argument('--device', help='default: cuda where there is one, else cpu')
    arguments.add_argument(
        '--host', default='127.0.0.1', help='address to serve on; default: this machine alone'
    )
    arguments.add_argument('--port', type=int, default=7860, help='default: 7860')
    return arguments


class Trial:
    """Answers for the page.

    Args:
        detector: In eval mode, with its adapter.
        pipeline: See :func:`~mmdet_gdino_lora.commands.image_demo.load`.
        scores: The lowest score of each class; the page's own for others, and where it is None.
    """

    def __init__(
        self, detector: Any, pipeline: Compose, scores: Mapping[str, Optional[float]]
    ) -> None:
        self._detector, self._pipeline, self._scores = detector, pipeline, scores

    def __call__(self, photo: Optional[str], text: str, least: float, strength: float) -> Answer:
        """Detects in a photo.

        Args:
            photo: Its file; None: there is none.
            text: Names.
            least: Lowest score that is shown.
            strength: Of the adapter; 0: the base, 1: the tuned model.

        Returns:
            What was found; or in one sentence what is missing.
        """
        from mmdet_gdino_lora.playground.page import Answer

        try:
            return self._detected(photo, text, least, strength)
        except ConfigError as error:
            return Answer(None, [], str(error))

    def _detected(self, photo: Optional[str], text: str, least: float, strength: float) -> Answer:
        import cv2

        from mmdet_gdino_lora.checks.names import check_texts
        from mmdet_gdino_lora.commands.drawing import draw_boxes
        from mmdet_gdino_lora.commands.image_demo import detect
        from mmdet_gdino_lora.playground.page import Answer
        from mmdet_gdino_lora.text import split_names

        if not photo:
            raise ConfigError('there is no photo yet; drop one on the page')
        names = [name for line in text.splitlines() for name in split_names(line)]
        if not names:
            raise ConfigError(f'the text {text!r} names nothing; write a name on each line')
        image = cv2.imread(photo)
        if image is None:
            raise ConfigError('the photo is no image that OpenCV can read; save it as .jpg or .png')
        # 'default' by name leaves the config's route on, as image-demo does.
        weights = 'default' if strength == 1 else {'default': strength} if strength else None
        self._detector.set_adapter(weights)
        found = detect(self._detector, self._pipeline, photo, names)
        lowest = [self._scores.get(name) for name in names]
        given = found.scores.new_tensor([least if score is None else score for score in lowest])
        found = found[found.scores >= given[found.labels]]
        scores, labels = found.scores.tolist(), found.labels.tolist()
        words = [f'{names[label]} {score:.2f}' for label, score in zip(labels, scores)]
        picture = draw_boxes(image, found.bboxes.cpu().numpy(), labels, words)
        rows = [
            (names[label], score, *box)
            for label, score, box in zip(labels, scores, found.bboxes.tolist())
        ]
        told = [f'{len(rows)} found', *(f.sentence for f in check_texts('the text', text, names))]
        return Answer(picture[..., ::-1], rows, '; '.join(told))

"""A tiny COCO folder to make mistakes in, and what the checks before a run say of them."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

import pytest
from mmengine.config import Config
from mmengine.logging import MMLogger

from mmdet_gdino_lora.engine.preflight import check_config
from mmdet_gdino_lora.errors import ConfigError
from tests.tool_run import write_data

ROOT = Path(__file__).parent.parent.parent
CLASSES = ('red circle', 'blue dog', 'hot star')


class Told(logging.Handler):
    """What the checks warned of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.sentences: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.sentences.append(record.getMessage())


class Case:
    """A run's config and its data, which are right until a test changes them.

    Attributes:
        root: Folder of the data: annotations/{train,val}.json, train/, val/.
        cfg: The config.
        file: Content of the training data's annotation file.
    """

    def __init__(self, root: Path, cfg: Config, told: Told) -> None:
        self.root, self.cfg, self._told = root, cfg, told
        self.path = root / 'annotations/train.json'
        self.file: dict[str, Any] = json.loads(self.path.read_text())
        self._written = copy.deepcopy(self.file)

    @property
    def data(self) -> Any:
        """Config of the training data."""
        return self.cfg.train_dataloader.dataset

    def check(self) -> tuple[list[str], Optional[str]]:
        """Checks the config: what was warned of, and the error, if there was one."""
        if self.file != self._written:
            self.path.write_text(json.dumps(self.file))
        self._told.sentences.clear()
        try:
            check_config(self.cfg)
        except ConfigError as error:
            return self._told.sentences, str(error)
        return self._told.sentences, None

    def expect(self, sentence: str, stops: bool) -> None:
        """Checks the config, of which one sentence has to hold all parts of another.

        Args:
            sentence: Parts, separated by ``...``; ``FILE`` stands for the annotation file.
            stops: Whether it is an error; a warning else, and the only one.
        """
        warned, error = self.check()
        assert (error is not None) == stops, (warned, error)
        told = error if error is not None else warned[0]
        assert stops or len(warned) == 1, warned
        assert '\n' not in told and '. ' not in told.replace(' . ', ''), told
        for part in sentence.replace('FILE', str(self.path)).split('...'):
            assert part in told, (part, told)


@pytest.fixture(scope='session')
def _right(tmp_path_factory: pytest.TempPathFactory, text_dir: str) -> tuple[Path, Config]:
    root = tmp_path_factory.mktemp('coco') / 'data'
    write_data(root, CLASSES, ('train', 'val'))
    cfg = Config.fromfile(ROOT / 'configs/gdino_lora_shapes.py')
    cfg.model.language_model.name = text_dir
    cfg.model.retain = None
    for stage in ('train', 'val'):
        data = cfg[f'{stage}_dataloader'].dataset
        data.update(
            metainfo=dict(classes=CLASSES),
            ann_file=f'annotations/{stage}.json',
            data_prefix=dict(img=f'{stage}/'),
        )
        for step in data.pipeline:
            if step['type'] == 'TokenSpans':
                step['tokenizer_name'] = text_dir
    return root, cfg


@pytest.fixture
def case(_right: tuple[Path, Config], tmp_path: Path) -> Iterator[Case]:
    """A right run, to be spoilt."""
    root = tmp_path / 'data'
    shutil.copytree(_right[0], root)
    cfg = copy.deepcopy(_right[1])
    for stage in ('train', 'val'):
        cfg[f'{stage}_dataloader'].dataset.data_root = f'{root}/'
    cfg.val_evaluator.ann_file = f'{root}/annotations/val.json'
    told = Told()
    logger = MMLogger.get_current_instance()
    logger.addHandler(told)
    try:
        yield Case(root, cfg, told)
    finally:
        logger.removeHandler(told)

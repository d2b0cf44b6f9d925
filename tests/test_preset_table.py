"""docs/presets.md is what tools/preset_table.py writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mmengine.config import Config
from transformers import BertConfig

ROOT = Path(__file__).resolve().parent.parent
COCO = 'configs/gdino_lora_coco.py'


@pytest.fixture
def bert_base(tmp_path: Path) -> str:
    """BERT-base's shape; its words don't matter here."""
    config = dict(BertConfig().to_dict(), architectures=['BertModel'])
    (tmp_path / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'vocab.txt').write_text('\n'.join(['[PAD]', '[UNK]', '[CLS]', '[SEP]', '.', '?']))
    return str(tmp_path)


def test_the_documented_table_is_the_generated_one(
    bert_base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('LANG_MODEL', bert_base)
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    from preset_table import preset_table

    cfg = Config.fromfile(str(ROOT / COCO))
    assert preset_table(cfg, COCO) == (ROOT / 'docs/presets.md').read_text(encoding='utf-8')

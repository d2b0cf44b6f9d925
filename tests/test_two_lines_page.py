"""docs/two_lines.md is what a run from a config of mmdet's says at its start."""

from __future__ import annotations

import sys

import pytest

from tests.tool_run import ROOT


def test_the_documented_table_is_the_generated_one(
    minilm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    monkeypatch.setenv('LANG_MODEL', minilm)
    monkeypatch.delitem(sys.modules, 'two_lines_page', raising=False)
    import two_lines_page

    assert two_lines_page.PAGE.read_text(encoding='utf-8') == two_lines_page.page()

"""docs/troubleshooting.md: its list of sentences is the code's, and its commands can be typed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from mmengine.config import Config, DictAction

from tests.tool_run import ROOT, run_tool

PAGE = (ROOT / 'docs/troubleshooting.md').read_text(encoding='utf-8')
COMMANDS = [
    line
    for block in re.findall(r'^```shell\n(.*?)^```', PAGE, flags=re.M | re.S)
    for line in block.splitlines()
]
SYMPTOMS = (
    'AP is 0',
    'Loss is NaN',
    'Nothing improves',
    'Out of memory',
    'It detects the same as before',
    'It forgot the old classes',
    'Scores are low',
    'It works only with all names in the caption',
)


@pytest.mark.parametrize('symptom', SYMPTOMS)
def test_what_somebody_sees_ends_in_a_command(symptom: str) -> None:
    (section,) = re.findall(rf'^## {symptom}.*?(?=^## )', PAGE, flags=re.M | re.S)
    assert 'python tools/' in section


def test_every_sentence_of_the_code_is_on_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import sentences

    said = list(sentences.sentences())
    assert len(said) > 100
    assert sentences.page() == PAGE, 'python tools/sentences.py writes it anew'


def test_a_sentence_that_is_not_on_the_page_is_missed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    import sentences

    (tmp_path / 'tools').mkdir()
    code = "raise ConfigError(f'{key}={value!r} is too ' f'blue: {_remedy()}')"
    (tmp_path / 'tools/new.py').write_text(code)
    monkeypatch.setattr(sentences, 'ROOT', tmp_path)
    expected = ('tools/new.py', 'KEY=VALUE is too blue: ...', 'error')
    assert list(sentences.sentences()) == [expected]
    assert sentences.page() != PAGE


@pytest.mark.parametrize('tool', sorted({shlex.split(command)[1] for command in COMMANDS}))
def test_the_commands_options_are_the_tools(tool: str, capsys: pytest.CaptureFixture) -> None:
    run_tool(f'python {tool} --help', ROOT)
    said = capsys.readouterr().out
    for command in COMMANDS:
        words = shlex.split(command)
        if words[1] == tool:
            assert [w for w in words if w.startswith('--') and w not in said] == []


@pytest.mark.parametrize('command', [c for c in COMMANDS if '--cfg-options' in c])
def test_the_settings_reach_the_config(command: str) -> None:
    cfg = Config.fromfile(ROOT / 'configs/gdino_lora_coco.py')
    after = shlex.split(command.partition('--cfg-options')[2].partition('--work-dir')[0])
    for key, _, value in (setting.partition('=') for setting in after):
        *parents, last = key.split('.')
        node = cfg
        for parent in parents:
            node = (
                node[int(parent)]
                if isinstance(node, (list, tuple))
                else node.setdefault(parent, {})
            )
        if last == 'num_negatives':
            assert node['type'] == 'TokenSpans'
        cfg.merge_from_dict({key: DictAction._parse_iterable(value)})

"""`make gpu`: one report, whatever its parts come to."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import re
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.tool_run import ROOT, TOOLS, dry_make

STEPS = """\
round 1: ours, decoder: 0.09 s
| contender | trained (M) | step (s) | backward | kept (MB) | peak (MB) | launches | host waits |
| --- | --: | --: | --: | --: | --: | --: | --: |
| mmdet, full | 172.2 | 0.800 | 0.400 | 31000 | 40000 | 14401 | 2178 |
| mmdet + PEFT, decoder | 2.0 | 0.400 | 0.100 | 9000 | 12000 | 12445 | 2178 |
| ours, decoder | 2.0 | 0.100 | 0.020 | 1300 | 4000 | 4179 | 1 |
"""


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The command on a machine whose card is of no importance here."""
    monkeypatch.syspath_prepend(str(TOOLS))
    made = importlib.import_module('gpu_report')
    monkeypatch.setattr(made, 'no_gpu', lambda: None)
    monkeypatch.setattr(made, 'about', lambda: ['NVIDIA Something, 80 GiB'])
    return made


def part(tool: ModuleType, title: str, code: str, seconds: float = 60) -> object:
    return tool.Part(title, ('-c', code), seconds)


def made(tool: ModuleType, folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and report of a command line."""
    with pytest.raises(SystemExit) as end:
        tool.main(['--out', str(folder), *arguments])
    return end.value.code, (folder / 'report.md').read_text()


def test_without_a_card_it_says_so_in_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        importlib.import_module('gpu_report').main([])
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ''
    assert said.err.startswith('error: there is no GPU here: torch ') and said.err.count('\n') == 1
    assert not list(tmp_path.iterdir())


def test_card_versions_and_commit_are_told(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    card = SimpleNamespace(name='NVIDIA Something', total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, 'get_device_properties', lambda number: card)
    first, versions, kernels, commit = importlib.import_module('gpu_report').about()
    assert first.startswith('NVIDIA Something, 80 GiB, compute capability 9.0; ')
    assert f'torch {torch.__version__}, ' in versions and 'peft ' in versions
    assert 'None' not in versions
    assert kernels.startswith("mmcv's kernels: CUDA ") and commit.startswith('commit ')


def test_the_report_names_the_card_and_has_every_parts_tables(tool, monkeypatch, tmp_path):
    parts = dict(
        tests=part(tool, 'Tests', 'print("." * 9 + "\\n4 passed in 2.0s")'),
        step=part(tool, 'A training step', f'print({STEPS!r})'),
    )
    monkeypatch.setattr(tool, 'PARTS', parts)
    code, page = made(tool, tmp_path, '--parts', 'tests', 'step')
    assert code == 0
    assert page.startswith('# On a GPU\n\n- NVIDIA Something, 80 GiB\n\n## Tests\n')
    lines = page.splitlines()
    assert '4 passed in 2.0s' in lines
    assert '.' * 9 not in lines and 'round 1: ours, decoder: 0.09 s' not in lines
    assert STEPS.partition('\n')[2] in page
    assert '| ours, decoder | 0.12 | 0.25 | 0.10 |' in page  # of both's time, of full's memory


def test_a_part_that_fails_shows_its_last_lines_and_the_others_go_on(tool, monkeypatch, tmp_path):
    broken = (
        'print("\\n".join(f"line {n}" for n in range(50))); raise ValueError("no kernel image")'
    )
    parts = dict(
        criterion=part(tool, 'The objective', broken),
        demo=part(tool, 'The demo', 'print("| a | b |\\n|---|---|\\n| 1 | 2 |")'),
    )
    monkeypatch.setattr(tool, 'PARTS', parts)
    code, page = made(tool, tmp_path, '--parts', 'criterion', 'demo')
    assert code == 1
    assert ': failed, ' in page and 'ValueError: no kernel image\n```' in page
    assert 'line 49\n' in page and 'line 20\n' not in page
    assert '| 1 | 2 |' in page and ': passed, ' in page


def test_a_part_out_of_time_is_stopped_with_what_it_started(tool, monkeypatch, tmp_path):
    held = tmp_path / 'held'
    worker = (
        f'import fcntl, time; file = open({str(held)!r}, "w"); fcntl.flock(file, fcntl.LOCK_EX); '
        'print("begun"); time.sleep(600)'
    )
    code = f'import subprocess, sys; subprocess.run([sys.executable, "-c", {worker!r}])'
    monkeypatch.setattr(tool, 'PARTS', dict(demo=part(tool, 'The demo', code, seconds=5)))
    ended, page = made(tool, tmp_path / 'out', '--parts', 'demo')
    assert ended == 1 and ': stopped, ' in page and 'begun\n```' in page
    with held.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # waits as long as somebody holds it


def test_all_parts_together_keep_to_the_budget(tool, monkeypatch, tmp_path):
    long = 'import time; time.sleep(60)'
    monkeypatch.setattr(tool, 'PARTS', {n: part(tool, n, long) for n in ('step', 'demo')})
    begin = time.monotonic()
    code, page = made(tool, tmp_path, '--parts', 'step', 'demo', '--budget', '1')
    assert time.monotonic() - begin < 20
    assert code == 1 and page.count(': stopped, ') == 2


def test_one_part_is_made_again_and_the_others_stay(tool, monkeypatch, tmp_path):
    parts = {
        'tests': part(tool, 'Tests', 'print("1 failed in 1s"); raise SystemExit(1)'),
        'step': part(tool, 'A training step', f'print({STEPS!r})'),
    }
    monkeypatch.setattr(tool, 'PARTS', parts)
    assert made(tool, tmp_path, '--parts', 'step', 'tests')[0] == 1
    parts['tests'] = part(tool, 'Tests', 'print("1 passed in 1s")')
    code, page = made(tool, tmp_path, '--parts', 'tests')
    assert code == 0 and '1 passed' in page and '1 failed' not in page
    assert page.index('## Tests') < page.index('## A training step')
    assert json.loads((tmp_path / 'step.json').read_text())['end'] == 'passed'


def test_every_part_is_a_command_of_this_project(tool) -> None:
    for name, made_of in tool.PARTS.items():
        assert (ROOT / next(a for a in made_of.arguments if a.endswith('.py'))).is_file()
        assert made_of.seconds <= 300, name


def test_the_card_is_hidden_from_all_tests_but_those_of_a_gpu(tool, monkeypatch, tmp_path) -> None:
    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''
    code = 'import os; print("| a |\\n|---|\\n|", os.environ["GPU_TESTS"], "|")'
    monkeypatch.setattr(tool, 'PARTS', dict(tests=part(tool, 'Tests', code)))
    assert made(tool, tmp_path, '--parts', 'tests')[1].endswith('| 1 |\n')


def test_ratios_are_of_steps_alone(tool) -> None:
    from gpu_tables import ratios, tables

    (steps,) = tables(STEPS)
    table = ratios(steps)
    assert table is not None
    assert table[0] == (
        "|  | of mmdet, full's time | of mmdet + PEFT, decoder's time | of mmdet, full's memory |"
    )
    assert table[2] == '| mmdet, full | 1.00 | 2.00 | 1.00 |'
    assert ratios(['| | ms |', '|---|--:|', '| ours | 2 |']) is None
    # Of a table that was cut off there is nothing to show.
    assert tables('| a |\n|---|\n') == []


def test_what_the_page_types_is_there() -> None:
    page = (ROOT / 'docs/cuda.md').read_text()
    lines = ''.join(re.findall(r'```shell\n(.*?)```', page, flags=re.DOTALL)).splitlines()
    assert len(lines) > 5
    for line in lines:
        words = [word for word in line.split() if '=' not in word]
        if words[0] == 'make':
            dry_make(' '.join(words))
        files = [word for word in words if word.endswith(('.py', '.sh'))]
        assert all((ROOT / file).is_file() for file in files), line

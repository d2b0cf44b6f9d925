"""The four ways in: each command of docs/ways_in.md runs, in a short form; nothing new slips in."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import mmdet
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.fileio import load

from tests.tool_run import (
    ROOT,
    Things,
    base_for,
    dry_make,
    dry_pip,
    inside,
    python_of_launcher,
    run_typed,
    small,
    write_data,
)

PAGE = (ROOT / 'docs/ways_in.md').read_text(encoding='utf-8')
MMDET = Path(mmdet.__file__).parent / '.mim'


def commands(heading: str) -> list[str]:
    """The commands below one of the page's headings."""
    part = PAGE.partition(f'## {heading}\n')[2].partition('\n## ')[0]
    lines = ''.join(re.findall(r'^```shell\n(.*?)^```', part, flags=re.M | re.S)).splitlines()
    return [re.split(r'\s+# ', line)[0].strip() for line in lines]


def installed(command: str, folder: Path) -> None:
    """`gdino-lora ...`, in this process."""
    assert command.startswith('gdino-lora ')
    run_typed(command, folder)


def mmdets(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python $MMDET/tools/x.py ...`, in this process."""
    python, script, *arguments = shlex.split(command.replace('$MMDET', str(MMDET)))
    assert python == 'python'
    monkeypatch.setattr(sys, 'argv', [script, *arguments])
    with inside(folder):
        runpy.run_path(script, run_name='__main__')


@pytest.fixture(scope='module')
def cat(text_dir: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the page's `cat.py`, a config of mmdet's made small, with its data and a base."""
    folder = tmp_path_factory.mktemp('cat')
    (code,) = re.findall(r'^```python\n(# cat.py.*?)^```', PAGE, flags=re.M | re.S)
    (folder / 'cat.py').write_text(code)
    write_data(folder / 'data/cat', ('cat',), ('trainval', 'test'))
    with inside(folder):
        cfg = small(Config.fromfile('cat.py'))
    assert cfg.load_from.startswith('https://')
    cfg.model.language_model.name = text_dir
    cfg.load_from = base_for(cfg, folder / 'base.pth')
    for name, split in dict(train='trainval', val='test', test='test').items():
        cfg[f'{name}_dataloader'].dataset.data_prefix = ConfigDict(img=f'{split}/')
    cfg.dump(folder / 'cat.py')
    return folder


def test_a_clone_with_its_environment(things: Things) -> None:
    make, *rest = commands('A clone, with an environment of its own')
    dry_make(make)
    assert len(rest) == 2
    for command in rest:
        things.run(command)


def test_pip_without_a_clone(things: Things) -> None:
    pip, train, test = commands('pip, without a clone')
    dry_pip(pip)
    installed(train, things.folder)
    checkpoint = things.folder / 'work_dirs/my_things/epoch_1.pth'
    installed(test.replace('epoch_12', 'epoch_1'), things.folder)
    assert checkpoint.is_file()


def test_two_lines_in_an_mmdet_config_train_validate_resume_and_test(cat: Path) -> None:
    train, resume, test = commands('Two lines in a config that you have')
    installed(train, cat)
    work_dir = cat / 'work_dirs/cat'
    first = torch.load(work_dir / 'epoch_1.pth', weights_only=False)
    assert any('bbox_mAP' in name for name in first['message_hub']['log_scalars'])
    installed(f'{resume} --cfg-options train_cfg.max_epochs=2', cat)
    second = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    assert second['meta']['epoch'] == 2
    for content in (first, second):
        factors = [name for name in content['state_dict'] if '.lora_' in name]
        assert factors and len(content['state_dict']) < 2 * len(factors)
    moved = [n for n in factors if not torch.equal(first['state_dict'][n], second['state_dict'][n])]
    assert moved
    test = test.replace('epoch_20', 'epoch_2')
    installed(f'{test} --out found.pkl', cat)
    assert len(load(cat / 'found.pkl')) == 2


def test_mmdets_own_tools(cat: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train, test, ranks = commands("mmdet's own tools")
    mmdets(f'{train} --work-dir {tmp_path}', cat, monkeypatch)
    checkpoint = test.replace('work_dirs/cat/epoch_20.pth', f'{tmp_path}/epoch_1.pth')
    mmdets(f'{checkpoint} --work-dir {tmp_path} --out {tmp_path}/found.pkl', cat, monkeypatch)
    assert len(load(tmp_path / 'found.pkl')) == 2
    # tests/test_launchers.py runs it whole.
    command_line = shlex.split(ranks.replace('$MMDET', str(MMDET)))
    said = python_of_launcher(command_line, cat, tmp_path / 'bin')
    assert '--nproc_per_node=2' in said and f'{MMDET}/tools/train.py cat.py' in said


def test_the_page_has_four_ways_of_three_commands_and_a_launcher_that_is_tested() -> None:
    headings = re.findall(r'^## (.*)', PAGE, flags=re.M)
    assert [len(commands(heading)) for heading in headings] == [3, 3, 3, 3, 1]
    tested = (ROOT / 'tests/test_launchers.py').read_text()
    assert 'torch.distributed.run --nnodes 2' in tested and commands('Several machines')[
        0
    ].startswith('torchrun --nnodes 2')

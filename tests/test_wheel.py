"""The wheel, installed in an environment of its own beside the stack: no clone is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from mmengine.config import Config

from mmdet_gdino_lora.datasets.shapes import NEW_CLASSES, Split, write_shapes
from tests.tool_run import ROOT

PARTS = ('setup.py', 'pyproject.toml', 'gdino_lora.py', 'mmdet_gdino_lora', 'configs', 'assets')
PARTS += ('LICENSE', 'README.md', 'model-index.yml')
#: Runs a program with one command line after the other: what it imports takes ten seconds.
TYPED = """\
import runpy, sys
program, *lines = sys.argv[1:]
for line in lines:
    sys.argv = [program, *line.split()]
    try:
        runpy.run_path(program, run_name='__main__')
    except SystemExit as end:
        if end.code:
            raise
"""
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check']


def do(*command: object, cwd: Path) -> str:
    """Runs a command, without this checkout's package on the path."""
    env = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
    env.update(HF_HUB_OFFLINE='1', OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build left in the checkout stays out."""
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(
                ROOT / part,
                source / part,
                symlinks=True,
                ignore=shutil.ignore_patterns('__pycache__'),
            )
        else:
            shutil.copy(ROOT / part, source / part)
    options = ['--no-build-isolation', '--no-deps', '-q', '-w', folder]
    do(*PIP, 'wheel', source, *options, cwd=folder)
    (built,) = folder.glob('*.whl')
    return built


@pytest.fixture(scope='module')
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs' folder of an environment with the wheel, and this one's stack behind it."""
    folder = tmp_path_factory.mktemp('environment')
    do(sys.executable, '-m', 'venv', '--without-pip', folder, cwd=folder)
    python = folder / 'bin/python'
    show = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    packages = Path(do(python, '-c', show, cwd=folder).strip())
    # A path in a .pth file brings the packages there, but no editable installation of ours.
    (packages / 'stack.pth').write_text(sysconfig.get_path('purelib') + '\n')
    install = ['install', '--no-deps', '--no-index', '--ignore-installed', '-q', wheel]
    do(*PIP, '--python', python, *install, cwd=folder)
    return folder / 'bin'


def test_the_wheel_holds_every_config_and_asset(wheel: Path) -> None:
    packed = zipfile.ZipFile(wheel).namelist()
    for folder in ('configs', 'assets'):
        for path in (ROOT / folder).rglob('*'):
            if path.is_file() and '__pycache__' not in path.parts:
                assert f'mmdet_gdino_lora/.mim/{path.relative_to(ROOT)}' in packed
    assert 'mmdet_gdino_lora/.mim/model-index.yml' in packed
    assert not [name for name in packed if name.startswith(('tests/', 'tools/'))]


def test_a_config_by_name_and_the_demo_train_without_a_clone(
    installed: Path, tmp_path: Path
) -> None:
    program = installed / 'gdino-lora'
    assert 'watch a small model learn' in do(program, '--help', cwd=tmp_path)
    write_shapes(tmp_path / 'data/shapes', splits={'new_train': Split(NEW_CLASSES, 8)})
    settings = 'train_cfg.max_epochs=1 train_dataloader.num_workers=0'
    settings += ' train_dataloader.persistent_workers=False'
    settings += ' val_cfg=None val_dataloader=None val_evaluator=None'
    train = f'train gdino_lora_shapes --cfg-options {settings}'
    said = do(installed / 'python', '-c', TYPED, program, train, 'demo --quick', cwd=tmp_path)
    assert 'new classes' in said and (tmp_path / 'work_dirs/demo/predictions.png').is_file()
    work_dir = tmp_path / 'work_dirs/gdino_lora_shapes'
    assert (work_dir / 'epoch_1.pth').is_file()
    base = Config.fromfile(work_dir / 'gdino_lora_shapes.py').model.base_checkpoint
    assert base.startswith(str(installed.parent)) and os.path.isfile(base)

"""The command `gdino-lora`: its help, its names, and what it says where something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import packaging
import pytest
from mmengine.config import Config

import gdino_lora
from mmdet_gdino_lora.errors import ConfigError
from mmdet_gdino_lora.shipped import CONFIGS, config_path, names, typed_config
from tests.tool_run import ROOT

AS_MODULE = ['-m', 'mmdet_gdino_lora']
AS_COMMAND = ['-c', 'from gdino_lora import main; main()']


def started(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A Python process with this checkout on its path."""
    env = dict(os.environ, PYTHONPATH=str(ROOT)) | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True
    )


# -------------------------------------------------------------------------------------- help, names


@pytest.mark.parametrize('way', [AS_COMMAND, AS_MODULE], ids=['command', 'module'])
@pytest.mark.parametrize('asked', [['--help'], ['train', '--help'], ['trian']])
def test_help_and_mistakes_wait_for_no_import(
    way: list[str], asked: list[str], tmp_path: Path
) -> None:
    done = started('-X', 'importtime', *way, *asked, cwd=tmp_path)
    imported = {line.rpartition('|')[2].strip() for line in done.stderr.splitlines() if '|' in line}
    assert 'gdino_lora' in imported
    assert not imported & {'torch', 'mmdet', 'mmengine', 'mmcv', 'transformers', 'numpy'}
    assert done.returncode == (2 if asked == ['trian'] else 0)


def test_help_has_a_line_for_each_command(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        gdino_lora.main(['--help'])
    said = capsys.readouterr().out
    assert not end.value.code and said.startswith('usage: gdino-lora COMMAND')
    for name, (file, told) in gdino_lora.COMMANDS.items():
        assert f'  {name} ' in said and told in said
        assert (ROOT / 'tools' / f'{file}.py').is_file()  # the same in a clone


@pytest.mark.parametrize('name', gdino_lora.COMMANDS)
def test_a_commands_help_names_it(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, 'argv', ['elsewhere'])
    with pytest.raises(SystemExit) as end:
        gdino_lora.main([name, '--help'])
    assert not end.value.code
    assert capsys.readouterr().out.startswith(f'usage: gdino-lora {name} ')


def test_a_tools_name_is_a_command() -> None:
    assert gdino_lora.full_name('merge_adapter.py') == gdino_lora.full_name('merge') == 'merge'
    assert gdino_lora.full_name('image_demo') == 'image-demo'
    assert gdino_lora.full_name('benchmark') is None


@pytest.mark.parametrize(
    'word, told',
    [('trian', "did you mean 'train'?"), ('xyz', 'there are new-config, check-dataset, ')],
)
def test_an_unknown_command_names_the_nearest(
    word: str, told: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as end:
        gdino_lora.main([word])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count('\n') == 1
    assert f'{word!r}: no such command' in error and told in error


@pytest.mark.parametrize('way', [AS_COMMAND, AS_MODULE], ids=['command', 'module'])
def test_a_broken_environment_is_told_in_one_sentence(way: list[str], tmp_path: Path) -> None:
    """Without site-packages there is no torch; what pip brings with the package is there."""
    (tmp_path / 'packaging').symlink_to(Path(packaging.__file__).parent)
    path = f'{ROOT}:{tmp_path}'
    done = started('-S', *way, 'train', 'gdino_lora_coco', cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2 and done.stderr.count('\n') == 1
    assert done.stderr.startswith('error: torch is not installed') and 'pip install' in done.stderr


# ------------------------------------------------------------------------------------------ configs


def test_a_config_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = str(CONFIGS / 'gdino_lora_coco.py')
    for word in ('gdino_lora_coco', 'gdino_lora_coco.py', 'mmdet_gdino_lora::gdino_lora_coco.py'):
        assert typed_config(word) == wanted
    assert typed_config('my_things.py') == 'my_things.py'
    (tmp_path / 'gdino_lora_coco.py').touch()  # a file of one's own comes first
    assert typed_config('gdino_lora_coco.py') == 'gdino_lora_coco.py'
    with pytest.raises(ConfigError, match='mmdet_gdino_lora::coco: .* it has gdino_lora_coco, '):
        typed_config('mmdet_gdino_lora::coco')


def test_the_packages_configs_are_the_clones() -> None:
    assert names() == sorted(path.stem for path in (ROOT / 'configs').glob('*.py'))
    for name in names():
        assert os.path.samefile(config_path(name), ROOT / 'configs' / f'{name}.py')


def test_a_config_inherits_from_the_packages(tmp_path: Path) -> None:
    mine = tmp_path / 'mine.py'
    mine.write_text(
        "_base_ = 'mmdet_gdino_lora::gdino_lora_shapes.py'\nmodel = dict(lora=dict(r=3))\n"
    )
    cfg = Config.fromfile(mine)
    assert cfg.model.lora == dict(preset='all', r=3, lora_alpha=64)
    assert os.path.isfile(cfg.model.base_checkpoint)
    assert os.path.isdir(cfg.model.language_model.name)
    assert '_scope_' not in cfg.model
    mine.write_text("_base_ = 'mmdet_gdino_lora::shapes.py'\n")
    with pytest.raises(ConfigError, match='shapes.py: the package has no such config'):
        Config.fromfile(mine)


def test_mmdets_own_tools_find_the_packages_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read a config before it can import anything: mmengine is as it came."""
    monkeypatch.setattr(Config, '_get_cfg_path', staticmethod(Config._get_cfg_path.knows_ours))
    mine = tmp_path / 'mine.py'
    mine.write_text("_base_ = __import__('mmdet_gdino_lora').config_path('gdino_lora_shapes')\n")
    assert Config.fromfile(mine).model.type == 'LoRAGroundingDINO'
    mine.write_text("_base_ = 'mmdet_gdino_lora::gdino_lora_shapes.py'\n")
    with pytest.raises(ValueError, match='_get_package_and_cfg_path'):
        Config.fromfile(mine)

"""What is missing in the environment is told in one sentence with the command that mends it."""

from __future__ import annotations

import distutils.core  # setuptools' own
import importlib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mmdet_gdino_lora import environment
from mmdet_gdino_lora.environment import SUPPORTED, check_environment
from mmdet_gdino_lora.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
STACKS = ('lowest', 'tested', 'highest')


def test_the_environment_of_the_tests_passes():
    check_environment()


def pretend(monkeypatch, **versions):
    real = environment.installed_version
    monkeypatch.setattr(
        environment, 'installed_version', lambda p: versions[p] if p in versions else real(p)
    )


@pytest.mark.parametrize('package', SUPPORTED)
def test_a_package_that_is_not_installed(monkeypatch, package):
    pretend(monkeypatch, **{package: None})
    with pytest.raises(ConfigError, match=f'^{package} is not installed .*pip install'):
        check_environment()


@pytest.mark.parametrize('package', SUPPORTED)
def test_a_package_that_is_too_old(monkeypatch, package):
    pretend(monkeypatch, **{package: '0.0.9'})
    with pytest.raises(ConfigError, match=f'^{package} 0.0.9 is installed, but .* or newer'):
        check_environment()


def test_an_mmcv_that_mmdet_refuses(monkeypatch):
    pretend(monkeypatch, mmcv='2.2.0')
    with pytest.raises(ConfigError, match=r'^mmcv 2.2.0 is installed, but .*below 2.2.0'):
        check_environment()


def test_local_and_pre_release_versions_are_compared_by_their_release(monkeypatch):
    pretend(monkeypatch, torch='2.13.0+cu130', transformers='5.24.0.dev0')
    check_environment()


def test_mmcv_lite(monkeypatch):
    pretend(monkeypatch, mmcv=None, **{'mmcv-lite': '2.1.0'})
    with pytest.raises(ConfigError, match='^mmcv-lite is installed, .*uninstall -y mmcv-lite'):
        check_environment()


@pytest.mark.parametrize(
    'error, reason',
    [
        (ModuleNotFoundError("No module named 'mmcv._ext'"), 'has no compiled ops'),
        (ImportError('undefined symbol: _ZN3c10'), 'ops compiled for another torch'),
    ],
)
def test_an_mmcv_without_its_ops(monkeypatch, error, reason):
    real = importlib.import_module

    def import_module(name, *args):
        if name == 'mmcv._ext':
            raise error
        return real(name, *args)

    monkeypatch.setattr(importlib, 'import_module', import_module)
    with pytest.raises(ConfigError, match=f'{reason}.*MMCV_WITH_OPS=1'):
        check_environment()


def allowed(package: str) -> SpecifierSet:
    lowest, too_new, _ = SUPPORTED[package]
    return SpecifierSet(f'>={lowest}' + (f',<{too_new}' if too_new else ''))


def pins(stack: str) -> dict[str, str]:
    """Versions by package, '.*' left out."""
    lines = (ROOT / 'requirements' / f'{stack}.txt').read_text(encoding='utf-8').splitlines()
    lines += (ROOT / 'requirements' / 'mmcv.txt').read_text(encoding='utf-8').splitlines()
    pairs = (line.split('==') for line in lines if not line.startswith('#'))
    return {package: version.removesuffix('.*') for package, version in pairs}


@pytest.fixture(scope='module')
def setup_py() -> distutils.core.Distribution:
    """What setup.py says."""
    return distutils.core.run_setup(str(ROOT / 'setup.py'), stop_after='init')


def test_setup_py_and_the_check_at_import_allow_the_same_versions(setup_py):
    required = {r.name: r.specifier for r in map(Requirement, setup_py.install_requires)}
    both = set(required) & set(SUPPORTED)
    assert both == {'transformers', 'peft'}
    assert {name: required[name] for name in both} == {name: allowed(name) for name in both}


@pytest.mark.parametrize('stack', STACKS)
def test_the_ranges_admit_the_versions_that_were_run(setup_py, stack):
    versions = pins(stack)
    ranges = {r.name: r.specifier for r in map(Requirement, setup_py.install_requires)}
    ranges |= {name: allowed(name) for name in SUPPORTED}
    del ranges['packaging']  # any will do
    assert set(ranges) <= set(versions)
    assert [name for name, range in ranges.items() if versions[name] not in range] == []


def test_the_ranges_begin_with_the_lowest_versions_that_were_run(setup_py):
    versions = pins('lowest')
    ranges = {r.name: r.specifier for r in map(Requirement, setup_py.install_requires)}
    ranges |= {name: allowed(name) for name in SUPPORTED}
    begins = {name: s.version for name, r in ranges.items() for s in r if s.operator == '>='}
    assert {n: Version(v) for n, v in begins.items()} == {n: Version(versions[n]) for n in begins}


def test_the_readme_tells_the_versions_that_were_run_and_the_ranges(setup_py):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    lines = text.split('## Tested versions')[1].split('##')[0].splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if '|' in line]
    told = {row[0].split()[0].strip(','): row[1:] for row in rows[2:]}
    for package, (lowest, too_new, _) in SUPPORTED.items():
        until = f' to below {too_new}' if too_new else ' or newer'
        versions = [pins(stack)[package] for stack in STACKS]
        assert told.pop(package) == [*versions, lowest + until]
    *_, python = told.pop('Python')
    lowest, too_new = python.split(' to below ')
    assert SpecifierSet(setup_py.python_requires) == SpecifierSet(f'>={lowest},<{too_new}')
    assert not told

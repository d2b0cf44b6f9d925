"""What is missing in the environment is told in one sentence with the command that mends it."""

from __future__ import annotations

import distutils.core  # setuptools' own
import importlib
import subprocess
from pathlib import Path
from typing import Optional

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mmdet_gdino_lora import environment
from mmdet_gdino_lora.environment import (
    FAMILIES,
    check_environment,
    module_version,
    remedy,
    supported,
)
from mmdet_gdino_lora.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
#: The stack of each, and the family of its mmcv, mmengine and mmdet.
STACKS = dict(lowest='OpenMMLab', tested='OpenMMLab', highest='OpenMMLab', onedl='OneDL')
PACKAGES = [(family, module) for family in FAMILIES for module in supported(family)]


def test_the_environment_of_the_tests_passes():
    check_environment()


@pytest.fixture
def pretend(monkeypatch):
    """Pretends that one family is installed whole, apart from what is said of distributions."""

    def pretended(family: str, **instead: Optional[str]) -> None:
        packages = supported(family).values()
        versions = {p.distribution: f'{p.lowest}.0' for p in packages}
        versions |= {name.replace('_', '-'): version for name, version in instead.items()}
        files = {module: versions[p.distribution] for module, p in supported(family).items()}
        monkeypatch.setattr(environment, 'installed_version', versions.get)
        # OpenMMLab's say their versions, OneDL's ask the distribution's.
        silent = '' if family == 'OneDL' else None
        monkeypatch.setattr(
            environment, 'module_version', lambda m: files[m] and silent or files[m]
        )
        monkeypatch.setattr(environment, 'check_mmcv_ops', lambda mmcv: None)

    return pretended


@pytest.mark.parametrize('family', FAMILIES)
def test_either_family_passes_whole(pretend, family):
    pretend(family)
    assert environment.family() == family
    check_environment()


@pytest.mark.parametrize(('family', 'module'), PACKAGES)
def test_a_package_that_is_not_installed(pretend, family, module):
    package = supported(family)[module]
    pretend(family, **{package.distribution: None})
    with pytest.raises(
        ConfigError, match=f'^{package.distribution} is not installed .*pip install'
    ):
        check_environment()


@pytest.mark.parametrize(('family', 'module'), PACKAGES)
def test_a_package_that_is_too_old(pretend, family, module):
    name = supported(family)[module].distribution
    pretend(family, **{name: '0.0.9'})
    told = f"^{name} 0.0.9 is installed, but .* or newer.*pip install.* '{name}=="
    with pytest.raises(ConfigError, match=told):
        check_environment()


def test_an_mmcv_that_mmdet_refuses(pretend):
    pretend('OpenMMLab', mmcv='2.2.0')
    with pytest.raises(ConfigError, match=r'^mmcv 2.2.0 is installed, but .*below 2.2.0'):
        check_environment()


def test_local_and_pre_release_versions_are_compared_by_their_release(pretend):
    pretend('OpenMMLab', torch='2.13.0+cu130', transformers='5.24.0.dev0')
    check_environment()


def test_mmcv_lite(pretend):
    pretend('OpenMMLab', mmcv=None, mmcv_lite='2.1.0')
    with pytest.raises(ConfigError, match='^mmcv-lite is installed, .*uninstall -y mmcv-lite'):
        check_environment()


@pytest.mark.parametrize(
    ('family', 'other', 'uninstalled', 'installed'),
    [
        ('OneDL', 'mmcv', 'onedl-mmcv mmcv', 'onedl-mmcv=='),
        ('OneDL', 'mmengine', 'onedl-mmengine mmengine', 'onedl-mmengine=='),
        ('OpenMMLab', 'onedl_mmdetection', 'mmdet onedl-mmdetection', 'mmdet=='),
    ],
)
def test_both_families_files_over_each_other(pretend, family, other, uninstalled, installed):
    pretend(family, **{other: '9.8.7'})
    with pytest.raises(ConfigError) as error:
        check_environment()
    told = str(error.value)
    assert told.startswith(f'{other.replace("_", "-")} 9.8.7 is installed beside ')
    assert f'pip uninstall -y {uninstalled} && ' in told and f"'{installed}" in told


def test_one_package_of_the_other_family(pretend):
    pretend('OneDL', onedl_mmengine=None, mmengine='0.10.7')
    told = (
        "^mmengine 0.10.7 is installed beside packages of OneDL's.*-y mmengine && .*onedl-mmengine"
    )
    with pytest.raises(ConfigError, match=told):
        check_environment()


def test_a_distribution_whose_files_went_with_another_one(monkeypatch):
    monkeypatch.setattr(environment, 'module_version', lambda module: None)
    with pytest.raises(
        ConfigError, match='^torch .* is installed, but its files are gone: .*torch'
    ):
        check_environment()


def test_a_module_tells_its_version_without_being_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('checkout', 'emptied', 'silent'):
        (tmp_path / name).mkdir()
    for name in ('checkout', 'silent'):
        (tmp_path / name / '__init__.py').write_text('raise AssertionError')
    (tmp_path / 'checkout/version.py').write_text("# of 1\n__version__ = '1.2.3'\n")
    versions = {n: module_version(n) for n in ('checkout', 'emptied', 'silent', 'absent')}
    assert versions == dict(checkout='1.2.3', emptied=None, silent='', absent=None)


@pytest.mark.parametrize(('torch', 'wrapped'), [('2.13.0+cpu', False), ('2.14.1', True)])
def test_the_command_that_compiles_mmcv_asks_for_the_standard_that_torch_needs(
    tmp_path, monkeypatch, torch, wrapped
):
    monkeypatch.setattr(environment, 'installed_version', lambda name: torch)
    command = remedy(FAMILIES['OpenMMLab']['mmcv'])
    assert ('c++20' in command) == wrapped
    # In place of pip: mmcv's own flag, and a source that says which standard it was compiled for.
    (tmp_path / 'a.cpp').write_text('long standard = __cplusplus;')
    compiler = '${CXX:-c++} -std=c++17 -E a.cpp'
    line = command.partition('pip install')[0] + compiler
    said = subprocess.run(['bash', '-c', line], cwd=tmp_path, capture_output=True, text=True)
    assert ('202002L' if wrapped else '201703L') in said.stdout, said.stderr


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
    name = FAMILIES[environment.family()]['mmcv'].distribution
    with pytest.raises(
        ConfigError, match=f'{reason}.*uninstall -y {name} && .*MMCV_WITH_OPS=1.*{name}=='
    ):
        check_environment()


def allowed(family: str) -> dict[str, SpecifierSet]:
    """Ranges by distribution."""
    return {
        p.distribution: SpecifierSet(f'>={p.lowest}' + (f',<{p.too_new}' if p.too_new else ''))
        for p in supported(family).values()
    }


def pins(stack: str) -> dict[str, str]:
    """Versions by distribution, '.*' left out."""
    mmcv = 'onedl-mmcv' if STACKS[stack] == 'OneDL' else 'mmcv'
    files = [ROOT / 'requirements' / f'{name}.txt' for name in (stack, mmcv)]
    lines = [line for file in files for line in file.read_text(encoding='utf-8').splitlines()]
    pairs = (line.split('==') for line in lines if not line.startswith('#'))
    return {package: version.removesuffix('.*') for package, version in pairs}


@pytest.fixture(scope='module')
def setup_py() -> distutils.core.Distribution:
    """What setup.py says."""
    return distutils.core.run_setup(str(ROOT / 'setup.py'), stop_after='init')


@pytest.fixture(scope='module')
def required(setup_py) -> dict[str, SpecifierSet]:
    """setup.py's ranges by distribution."""
    return {r.name: r.specifier for r in map(Requirement, setup_py.install_requires)}


def test_setup_py_and_the_check_at_import_allow_the_same_versions(required):
    ranges = allowed('OpenMMLab')
    both = set(required) & set(ranges)
    assert both == {'transformers', 'peft'}
    assert {name: required[name] for name in both} == {name: ranges[name] for name in both}


@pytest.mark.parametrize('stack', STACKS)
def test_the_ranges_admit_the_versions_that_were_run(required, stack):
    versions = pins(stack)
    ranges = required | allowed(STACKS[stack])
    del ranges['packaging']  # any will do
    assert set(ranges) <= set(versions)
    assert [name for name, range in ranges.items() if versions[name] not in range] == []


@pytest.mark.parametrize('stack', ['lowest', 'onedl'])
def test_the_ranges_begin_with_the_lowest_versions_that_were_run(required, stack):
    versions = pins(stack)
    ranges = allowed(STACKS[stack])
    if stack == 'onedl':  # of its own; what both stand on begins with the lowest stack's
        ranges = {name: r for name, r in ranges.items() if name.startswith('onedl-')}
    else:
        ranges |= required
    begins = {name: s.version for name, r in ranges.items() for s in r if s.operator == '>='}
    assert {n: Version(v) for n, v in begins.items()} == {n: Version(versions[n]) for n in begins}


def test_the_readme_tells_the_versions_that_were_run_and_the_ranges(setup_py):
    text = (ROOT / 'README.md').read_text(encoding='utf-8')
    lines = text.split('## Tested versions')[1].split('##')[0].splitlines()
    rows = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if '|' in line]
    told = {row[0].split()[0].strip(','): row[1:] for row in rows[2:]}
    for module in supported('OpenMMLab'):
        in_families = [supported(family)[module] for family in FAMILIES]
        versions = [pins(s)[supported(f)[module].distribution] for s, f in STACKS.items()]
        ranges = [
            p.lowest + (f' to below {p.too_new}' if p.too_new else ' or newer') for p in in_families
        ]
        assert told.pop(module) == [*versions, '; '.join(dict.fromkeys(ranges))]
    *_, python = told.pop('Python')
    lowest, too_new = python.split(' to below ')
    assert SpecifierSet(setup_py.python_requires) == SpecifierSet(f'>={lowest},<{too_new}')
    assert not told

"""What is missing in the environment is told in one sentence with the command that mends it."""

from __future__ import annotations

import importlib

import pytest

from mmdet_gdino_lora import environment
from mmdet_gdino_lora.environment import SUPPORTED, check_environment
from mmdet_gdino_lora.errors import ConfigError


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

"""The tests' fixtures, where tests are run.

pytest-xdist's first process hands tests out and runs none. Without fixtures it imports neither
torch nor mmdet, for which its workers would wait ten seconds.
"""

from __future__ import annotations

import os

# The tests are of a CPU, on a machine with a GPU too; test_cuda.py's alone ask for the card.
if os.environ.get('GPU_TESTS') != '1':
    os.environ['CUDA_VISIBLE_DEVICES'] = ''

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption('numprocesses', None):
        config.pluginmanager.import_plugin('tests.fixtures')

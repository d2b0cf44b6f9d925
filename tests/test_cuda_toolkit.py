"""Where `make env` gets a compiler for CUDA from."""

from __future__ import annotations

import importlib
import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.tool_run import TOOLS

CUDA = '13.0'


@pytest.fixture
def toolkit(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(TOOLS))
    yield importlib.import_module('cuda_toolkit')


def lay(home: Path, files: list[str], release: str = CUDA) -> Path:
    """A toolkit's folder whose nvcc tells its release."""
    for file in files:
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_text(f'#!/bin/sh\necho Cuda compilation tools, release {release}, V1\n')
    (home / 'bin/nvcc').chmod(0o755)
    return home


def test_a_toolkit_of_torchs_cuda_with_all_headers_fits(toolkit, tmp_path):
    assert toolkit.misfit(lay(tmp_path, list(toolkit.NEEDED.values())), CUDA) is None


def test_torch_takes_another_minor_version(toolkit, tmp_path):
    assert toolkit.misfit(lay(tmp_path, list(toolkit.NEEDED.values()), '13.3'), CUDA) is None


def test_cuda_12_keeps_thrust_among_its_headers(toolkit, tmp_path):
    files = [toolkit.OLDER.get(file, file) for file in toolkit.NEEDED.values()]
    assert toolkit.misfit(lay(tmp_path, files, '12.8'), '12.6') is None


def test_what_does_not_fit_is_told(toolkit, tmp_path):
    files = list(toolkit.NEEDED.values())
    assert toolkit.misfit(None, CUDA) == 'there is no nvcc'
    assert toolkit.misfit(tmp_path, CUDA) == 'there is no nvcc'
    assert toolkit.misfit(lay(tmp_path / 'old', files, '12.8'), CUDA).endswith('is of CUDA 12.8')
    slim = lay(tmp_path / 'slim', [file for file in files if 'cublas' not in file])
    assert toolkit.misfit(slim, CUDA) == f'{slim} lacks include/cublas_v2.h'


def test_there_is_no_compiler_for_cuda_12_in_the_registry(toolkit, tmp_path):
    with pytest.raises(SystemExit, match=r'no nvcc for CUDA 12\.6; install .* set CUDA_HOME'):
        toolkit.make_toolkit(tmp_path, '12.6', [])


def wheel(folder: Path, name: str, files: dict[str, str], requires: tuple[str, ...] = ()) -> None:
    """Writes a wheel of version 13.0.2."""
    stem = f'{name.replace("-", "_")}-13.0.2'
    extras = {word.split('"')[1] for word in requires if 'extra' in word}
    lines = ['Metadata-Version: 2.1', f'Name: {name}', 'Version: 13.0.2']
    lines += [f'Provides-Extra: {extra}' for extra in sorted(extras)]
    lines += [f'Requires-Dist: {word}' for word in requires]
    about = {
        'METADATA': '\n'.join(lines) + '\n',
        'WHEEL': 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
        'RECORD': '',
    }
    with zipfile.ZipFile(folder / f'{stem}-py3-none-any.whl', 'w') as file:
        for path, text in files.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100755 if '/bin/' in path else 0o100644) << 16
            file.writestr(entry, text)
        for path, text in about.items():
            file.writestr(f'{stem}.dist-info/{path}', text)


def test_the_registrys_compiler_and_torchs_own_headers_make_a_toolkit(
    toolkit, tmp_path, monkeypatch
):
    registry, torchs, cu = tmp_path / 'registry', tmp_path / 'torchs', 'nvidia/cu13'
    registry.mkdir()
    nvcc = f'#!/bin/sh\necho release {CUDA}\n'
    runtime = {f'{cu}/{toolkit.NEEDED["cudart"]}': '', f'{cu}/lib/libcudart.so.13': ''}
    wheel(registry, 'some-nvcc', {f'{cu}/bin/nvcc': nvcc, **runtime})
    wheel(registry, 'some-cccl', {f'{cu}/{toolkit.NEEDED["cccl"]}': ''})
    wheel(registry, 'some-curand', {f'{cu}/{toolkit.NEEDED["curand"]}': ''})
    of = dict(nvcc='some-nvcc', cudart='some-nvcc', cccl='some-cccl', curand='some-curand')
    requires = tuple(f'{name}; extra == "{extra}"' for extra, name in of.items())
    # cuBLAS and the others, hundreds of megabytes each, are not even there: torch has brought them.
    wheel(registry, 'cuda-toolkit', {}, requires)
    for library in ('cublas', 'cusparse', 'cusolver'):
        file = torchs / toolkit.NEEDED[library]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(registry))
    home = toolkit.make_toolkit(tmp_path / 'made', CUDA, [torchs / 'include'])
    assert toolkit.misfit(home, CUDA) is None
    # The linker finds -lcudart where torch's build looks for it.
    assert (home / 'lib64/libcudart.so').resolve().name == 'libcudart.so.13'


def test_a_torch_without_cuda_is_told_so(toolkit, monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', None)
    with pytest.raises(SystemExit, match='^error: torch .* is a build without CUDA$'):
        toolkit.main()


#: In place of an interpreter: a torch that finds a card, no compiler, and a pip that tells its
#: environment. What mmcv has is in the file that it writes.
PYTHON = """\
#!/usr/bin/env bash
here=$(dirname "$0")
case "$*" in
  *get_device_capability*) echo cuda12.6-sm8.6 ;;
  *print*cache_tag*) echo "torch-${*: -1}" ;;
  *find_spec*) echo "$here/torch" ;;
  *get_compiling_cuda_version*) [ -z "${*: -1}" ] && [ -f "$here/mmcv" ] ;;
  *cuda_toolkit.py*) echo 'no nvcc for CUDA 12.6' >&2; exit 1 ;;
  *build_progress.py*) cat ;;
  *' pip '*' wheel '*)
    echo "compiled with cards '${CUDA_VISIBLE_DEVICES-all}', forced '${FORCE_CUDA-}'"
    while [ "$1" != -w ]; do shift; done
    mkdir -p "$2"; touch "$2/mmcv-2.1.0-py3-none-any.whl" "$here/mmcv" ;;
esac
"""


def installed(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    """What install_mmcv.sh says where there is a card and no compiler for it."""
    (tmp_path / 'torch/include/ATen').mkdir(parents=True)
    (tmp_path / 'torch/include/ATen/ATen.h').touch()
    (tmp_path / 'python').write_text(PYTHON)
    (tmp_path / 'python').chmod(0o755)
    env = dict(PATH=os.environ['PATH'], MMCV_WHEELS=str(tmp_path / 'kept'), **environment)
    command = ['bash', str(TOOLS / 'install_mmcv.sh'), str(tmp_path / 'python')]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_a_card_without_a_compiler_gets_the_ops_of_the_cpu(tmp_path: Path) -> None:
    done = installed(tmp_path)
    assert done.returncode == 0, done.stderr
    assert 'mmcv is installed without CUDA kernels; a GPU then trains more slowly' in done.stdout
    assert "compiled with cards '', forced ''" in done.stdout
    # Kept as what it is, not as what was asked for.
    assert [folder.name for folder in (tmp_path / 'kept').iterdir()] == ['torch-']


def test_kernels_that_were_asked_for_by_name_are_not_done_without(tmp_path: Path) -> None:
    done = installed(tmp_path, FORCE_CUDA='1')
    assert done.returncode == 1 and 'no nvcc for CUDA 12.6' in done.stderr
    assert 'compiled' not in done.stdout and not (tmp_path / 'kept').exists()

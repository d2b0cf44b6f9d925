"""Finds a compiler for CUDA, or takes one from the package registry: called by install_mmcv.sh.

    python tools/cuda_toolkit.py FOLDER

Prints what CUDA_HOME has to be for extensions of the torch that is installed: the toolkit that
torch finds, where it fits, else FOLDER's, which is made of NVIDIA's wheels for CUDA 13 and later.
Their wheels for CUDA 12 have no nvcc: there a toolkit has to be installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

#: Extra of the distribution cuda-toolkit: a file of it that torch's headers or nvcc ask for.
NEEDED = {
    'nvcc': 'bin/nvcc',
    'cudart': 'include/cuda_runtime_api.h',
    'cccl': 'include/cccl/thrust/complex.h',
    'cublas': 'include/cublas_v2.h',
    'cusparse': 'include/cusparse.h',
    'cusolver': 'include/cusolverDn.h',
    'curand': 'include/curand_kernel.h',
}
#: Up to CUDA 12, thrust lies among the other headers.
OLDER = {'include/cccl/thrust/complex.h': 'include/thrust/complex.h'}
#: The first CUDA whose wheels have nvcc.
FIRST_WITH_NVCC = 13


def misfit(home: Optional[Path], cuda: str) -> Optional[str]:
    """Says why extensions can't be compiled with a toolkit.

    Args:
        home: Its folder; None where there is none.
        cuda: Version that torch was compiled with, as ``13.0``.

    Returns:
        The reason; None where it fits.
    """
    if home is None or not (home / NEEDED['nvcc']).is_file():
        return 'there is no nvcc'
    said = subprocess.run([home / NEEDED['nvcc'], '--version'], capture_output=True, text=True)
    found = re.search(r'release ([\d.]+)', said.stdout)
    release = found[1] if found else 'unknown'
    if release.split('.')[0] != cuda.split('.')[0]:
        return f'the nvcc in {home} is of CUDA {release}'
    lacking = [file for file in NEEDED.values() if not _has(home, file)]
    return f'{home} lacks {", ".join(lacking)}' if lacking else None


def _has(home: Path, file: str) -> bool:
    return (home / file).is_file() or (home / OLDER.get(file, file)).is_file()


def header_folders() -> list[Path]:
    """Lists where torch's own dependencies in this environment have NVIDIA's headers."""
    spec = find_spec('nvidia')
    places = spec.submodule_search_locations if spec else None
    return sorted(folder for place in places or () for folder in Path(place).glob('*/include'))


def make_toolkit(folder: Path, cuda: str, headers: Sequence[Path]) -> Path:
    """Installs the compiler and what of the headers is not there yet.

    Args:
        folder: To write to.
        cuda: Version that torch was compiled with.
        headers: Folders of headers that are there.

    Returns:
        The toolkit's folder.

    Raises:
        SystemExit: There are no such wheels, or pip could not install them.
    """
    major = cuda.split('.')[0]
    if int(major) < FIRST_WITH_NVCC:
        raise SystemExit(
            f'error: the package registry has no nvcc for CUDA {cuda}; install the CUDA toolkit '
            f'{cuda} and set CUDA_HOME to its folder, or take a torch for CUDA {FIRST_WITH_NVCC}'
        )
    there = {name for at in headers for name, file in NEEDED.items() if _has(at.parent, file)}
    # nvcc wants the runtime's headers and cccl beside it.
    extras = sorted(NEEDED.keys() - (there - {'nvcc', 'cudart', 'cccl'}))
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install', '--quiet']
    requirement = f'cuda-toolkit[{",".join(extras)}]=={cuda}.*'
    print(f'taking the compiler from the registry: {requirement}', file=sys.stderr)
    done = subprocess.run([*pip, '--target', str(folder), requirement], stdout=sys.stderr)
    home = folder / 'nvidia' / f'cu{major}'
    if done.returncode or not home.is_dir():
        raise SystemExit(f'error: {requirement} could not be installed')
    complete(home, headers)
    return home


def complete(home: Path, headers: Iterable[Path]) -> None:
    """Makes of the wheels' folder what torch's build takes for a toolkit.

    Args:
        home: The wheels' folder.
        headers: Folders whose headers are linked to where ``home`` lacks them.
    """
    for folder in headers:
        for header in folder.iterdir():
            link = home / 'include' / header.name
            if not link.exists():
                link.symlink_to(header.resolve())
    # The linker looks for -lcudart, and the wheels have the library under its full name alone.
    for library in (home / 'lib').glob('*.so.*'):
        link = library.with_name(library.name.split('.so.')[0] + '.so')
        if not link.exists():
            link.symlink_to(library.name)
    if not (home / 'lib64').exists():
        (home / 'lib64').symlink_to('lib')


def main() -> None:
    """Command line."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    cuda = torch.version.cuda
    if not cuda:
        raise SystemExit(f'error: torch {torch.__version__} is a build without CUDA')
    home = Path(CUDA_HOME) if CUDA_HOME else None
    reason = misfit(home, cuda)
    if reason:
        print(f'no CUDA toolkit for torch {torch.__version__} here: {reason}', file=sys.stderr)
        home = make_toolkit(Path(sys.argv[1]).resolve(), cuda, header_folders())
        reason = misfit(home, cuda)
        if reason:
            raise SystemExit(f'error: the toolkit of the registry is of no use: {reason}')
    print(home)


if __name__ == '__main__':
    main()

"""Writes a source distribution of mmcv's whose compiled ops are those that a detector here calls.

    python tools/reduced_mmcv.py mmcv-2.1.0.tar.gz FOLDER

Of mmcv's 58 CUDA files two are left, of its 113 ops deformable attention and NMS: minutes of
compiling instead of an hour, and a library that can be carried to a machine without a registry. Its
version is mmcv's with ``+reduced``, which pip prefers. The other ops are there by name, as mmcv's
import asks, and end in an error that says so when they are called.
"""

from __future__ import annotations

import argparse
import re
import tarfile
import tempfile
from pathlib import Path

CSRC = Path('mmcv/ops/csrc/pytorch')
#: Source files that are left in mmcv's folder of ops and below.
KEPT_FILES = {
    '': ('pybind.cpp', 'info.cpp', 'nms.cpp', 'ms_deform_attn.cpp'),
    'cpu': ('nms.cpp',),
    'cuda': ('cudabind.cpp', 'nms_cuda.cu', 'ms_deform_attn_cuda.cu'),
}
#: Ops that are left.
KEPT_OPS = {
    'get_compiler_version',
    'get_compiling_cuda_version',
    'ms_deform_attn_backward',
    'ms_deform_attn_forward',
    'nms',
    'nms_match',
    'softnms',
}
#: What the CUDA sources register of them.
KEPT_KERNELS = {'nms_impl', 'ms_deform_attn_impl_forward', 'ms_deform_attn_impl_backward'}
LEFT_OUT = """\
static void left_out(py::args, py::kwargs) {
  throw std::runtime_error("this op is not in a reduced build of mmcv");
}

"""


def reduced_names(pybind: str) -> str:
    """Takes other ops out of ``pybind.cpp``.

    Args:
        pybind: Its text.

    Returns:
        The text in which they are names alone.
    """
    module = 'PYBIND11_MODULE('
    assert module in pybind
    names = set()

    def one(definition: re.Match) -> str:
        name = definition[1]
        names.add(name)
        return definition[0] if name in KEPT_OPS else f'm.def("{name}", &left_out);'

    text = re.sub(r'm\.def\("(\w+)",.*?\);(?=\n)', one, pybind, flags=re.DOTALL)
    if not names >= KEPT_OPS:
        raise SystemExit(f'error: this mmcv has no ops {sorted(KEPT_OPS - names)}')
    return text.replace(module, LEFT_OUT + module)


def reduced_kernels(cudabind: str) -> str:
    """Takes other ops out of ``cudabind.cpp``.

    Args:
        cudabind: Its text: for each op declarations and functions, then what is registered of it.

    Returns:
        The text with the kept ops' alone.
    """
    pieces = re.findall(r'(.*?REGISTER_DEVICE_IMPL\((\w+).*?\);\n)', cudabind, flags=re.DOTALL)
    lacking = KEPT_KERNELS - {name for _, name in pieces}
    if lacking:
        raise SystemExit(f'error: this mmcv has no kernels {sorted(lacking)}')
    includes = re.findall(r'^#include .*\n', cudabind, flags=re.MULTILINE)
    return ''.join(includes + [piece for piece, name in pieces if name in KEPT_KERNELS])


def reduce(root: Path) -> None:
    """Takes other ops out of an unpacked source distribution.

    Args:
        root: Its folder.
    """
    for folder, names in KEPT_FILES.items():
        for file in (root / CSRC / folder).iterdir():
            if file.suffix in ('.cpp', '.cu') and file.name not in names:
                file.unlink()
    for name, change in (('pybind.cpp', reduced_names), ('cuda/cudabind.cpp', reduced_kernels)):
        file = root / CSRC / name
        file.write_text(change(file.read_text()))
    setup, version = root / 'setup.py', 'version=get_version()'
    text = setup.read_text()
    assert version in text
    setup.write_text(text.replace(version, f"{version} + '+reduced'"))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('sdist', type=Path, help="mmcv's source distribution")
    parser.add_argument('folder', type=Path, help='where the reduced one is written')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        with tarfile.open(args.sdist) as archive:
            archive.extractall(work, filter='data')
        (root,) = Path(work).iterdir()
        reduce(root)
        args.folder.mkdir(parents=True, exist_ok=True)
        name = f'{root.name}+reduced'
        with tarfile.open(args.folder / f'{name}.tar.gz', 'w:gz') as archive:
            archive.add(root, arcname=name)
    print(args.folder / f'{name}.tar.gz')


if __name__ == '__main__':
    main()

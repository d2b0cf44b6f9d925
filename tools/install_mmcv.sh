#!/usr/bin/env bash
# Installs mmcv with its compiled ops: install_mmcv.sh PYTHON [CONSTRAINTS [REQUIREMENT]]
# REQUIREMENT is requirements/mmcv.txt (OpenMMLab's) or onedl-mmcv.txt. pip takes a wheel where it finds one
# (PIP_FIND_LINKS), else mmcv is compiled; for a GPU with its nvcc, or with the registry's (cuda_toolkit.py).
# What was compiled is kept in $MMCV_WHEELS, by default ~/.cache/mmdet-gdino-lora, in a folder per torch, GPU,
# Python and platform: the next environment takes it from there.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
constraints=${2:-$tools/../requirements/tested.txt}
requirement=${3:-$tools/../requirements/mmcv.txt}
name=$(sed -n 's/==.*//p' "$requirement")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Left alone, mmcv's setup.py takes one core fewer than there are, or four at least.
export MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
# torch's build looks for ninja on the PATH, not in the environment it runs in.
export PATH="$(dirname "$python"):$PATH"

# CUDA's kernels are compiled for the cards that are there, or where FORCE_CUDA=1 and TORCH_CUDA_ARCH_LIST ask for them.
kernels=$("$python" -W ignore -c '
import os, torch
cards = sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
if cards or os.environ.get("FORCE_CUDA") == "1":
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", " ".join(cards) or "all")
    print(f"cuda{torch.version.cuda}-sm" + "-".join(wanted.replace(";", " ").split()))')

# Ops fit one torch, one Python and one platform.
find_kept() {
  kept=${MMCV_WHEELS:-${XDG_CACHE_HOME:-$HOME/.cache}/mmdet-gdino-lora}/$("$python" -W ignore -c '
import sys, sysconfig, torch
print("torch" + torch.__version__, sys.argv[1] or "cpu", sys.implementation.cache_tag, sysconfig.get_platform(), sep="-")' "$kernels")
}
find_kept

# mmcv asks for C++17; torch's headers say when they need C++20 (from 2.14 on). The last -std counts.
aten=$("$python" -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))')/include/ATen/ATen.h
if grep -q 'C++20 or later' "$aten"; then
  printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "${CXX:-c++}" > "$work/g++"
  chmod +x "$work/g++"
  export CXX="$work/g++" NVCC_APPEND_FLAGS="${NVCC_APPEND_FLAGS:-} -std=c++20"
fi

# Whether mmcv has the ops that were asked for.
has_ops() {
  problem=$("$python" -W ignore -c '
import sys
from mmcv.ops import get_compiling_cuda_version
if sys.argv[1] and get_compiling_cuda_version() == "not available":
    sys.exit("it has no CUDA kernels")' "$kernels" 2>&1)
}

# Runs pip, and shows how far it is.
pip() {
  set +e
  "$python" -m pip --disable-pip-version-check "$@" 2>&1 | tee "$work/log" | "$python" "$tools/build_progress.py"
  local status=${PIPESTATUS[0]}
  set -e
  if [ "$status" -ne 0 ]; then
    tail -n 40 "$work/log" >&2
    echo "error: $name could not be installed (see above); compiling it needs a C++ compiler (g++), the Python headers and about 2 GB of memory per core" >&2
    exit 1
  fi
}
install() { pip install -v -c "$constraints" "$@"; }
# Makes a wheel, or finds one, and installs it.
build() {
  rm -rf "$work/wheel"
  pip wheel -v --no-deps --no-build-isolation -c "$constraints" -w "$work/wheel" "$@" -r "$requirement"
  install --force-reinstall --no-deps "$work"/wheel/*.whl
  install "$work"/wheel/*.whl
}
keep() {
  mkdir -p "$kept"
  cp "$work"/wheel/*.whl "$kept/.new"
  mv "$kept/.new" "$kept/$(basename "$work"/wheel/*.whl)"
  echo "kept for the next environment: $kept"
}

take_kept() {
  if ! has_ops && [ -d "$kept" ]; then
    echo "looking for the wheel that an earlier environment built: $kept"
    if "$python" -m pip --disable-pip-version-check install -q --no-index --find-links "$kept" --force-reinstall --no-deps -r "$requirement"; then
      install --find-links "$kept" -r "$requirement"
    fi
  fi
}
# Where no compiler is to be had for the card's kernels, the ops of the CPU are enough to train with.
find_nvcc() {
  if CUDA_HOME=$("$python" -W ignore "$tools/cuda_toolkit.py" "$work/cuda"); then
    export CUDA_HOME FORCE_CUDA=1
  elif [ "${FORCE_CUDA:-}" = 1 ]; then
    exit 1
  else
    echo "$name is installed without CUDA kernels; a GPU then trains more slowly and with more memory: docs/cuda.md"
    unset CUDA_HOME
    export CUDA_VISIBLE_DEVICES= kernels=
    find_kept
    take_kept
  fi
}

take_kept
if [ -n "$kernels" ] && ! has_ops; then find_nvcc; fi
if ! has_ops; then
  minutes=14
  if [ -n "$kernels" ]; then minutes=45; fi
  echo "a ready wheel is used where pip finds one, else mmcv is compiled${kernels:+ with CUDA kernels}: about $minutes minutes on two cores, once"
  build
  if ! has_ops; then
    echo "that mmcv has no ops, or not those for this torch (${problem##*$'\n'}): compiling it for this one"
    build --no-cache-dir --no-binary "$name"
  fi
  has_ops || { echo "error: $name was compiled and its ops do not load: ${problem##*$'\n'}" >&2; exit 1; }
  keep
fi
"$python" -c 'import mmcv, mmcv.ops; print("mmcv", mmcv.__version__, "with compiled ops")'

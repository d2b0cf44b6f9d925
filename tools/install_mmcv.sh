#!/usr/bin/env bash
# Installs mmcv with its compiled ops: install_mmcv.sh PYTHON [CONSTRAINTS]
# pip takes a wheel where it finds one (PIP_FIND_LINKS, or its cache of an earlier build), else it compiles.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
requirements=$(cd "$(dirname "${BASH_SOURCE[0]}")/../requirements" && pwd)
constraints=${2:-$requirements/tested.txt}
log=$(mktemp)
compiler=$(mktemp -d)
trap 'rm -rf "$log" "$compiler"' EXIT
# Left alone, mmcv's setup.py takes one core fewer than there are.
export MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
# torch's build looks for ninja on the PATH, not in the environment it runs in.
export PATH="$(dirname "$python"):$PATH"

# mmcv asks for C++17; torch's headers say when they need C++20 (from 2.14 on). The last -std counts.
aten=$("$python" -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))')/include/ATen/ATen.h
if grep -q 'C++20 or later' "$aten"; then
  printf '#!/bin/sh\nexec %s "$@" -std=c++20\n' "${CXX:-c++}" > "$compiler/g++"
  chmod +x "$compiler/g++"
  export CXX="$compiler/g++"
fi

# Shows ninja's [n/m] counters in place of the compiler's thousands of lines.
install() {
  set +e
  "$python" -m pip --disable-pip-version-check install -v --no-build-isolation \
    -c "$constraints" "$@" -r "$requirements/mmcv.txt" 2>&1 | tee "$log" |
    grep --line-buffered -oE '\[[0-9]+/[0-9]+\]|Building wheel for mmcv|(Using cached|Processing) [^ ]*mmcv[^ ]*whl|Successfully installed .*'
  local status=${PIPESTATUS[0]}
  set -e
  if [ "$status" -ne 0 ]; then
    tail -n 40 "$log" >&2
    echo 'error: mmcv could not be installed (see above); compiling it needs a C++ compiler (g++), the Python headers and about 2 GB of memory per core' >&2
    exit 1
  fi
}
has_ops() { problem=$("$python" -W ignore -c 'import mmcv.ops' 2>&1); }

if ! has_ops; then
  echo 'a ready wheel is used where pip finds one, else mmcv is compiled: about 14 minutes on two cores, once'
  install
fi
if ! has_ops; then
  echo "that mmcv has no ops, or ops for another torch (${problem##*$'\n'}): compiling it for this one"
  install --force-reinstall --no-deps --no-cache-dir --no-binary mmcv
fi
"$python" -c 'import mmcv, mmcv.ops; print("mmcv", mmcv.__version__, "with compiled ops")'

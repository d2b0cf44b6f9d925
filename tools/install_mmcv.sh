#!/usr/bin/env bash
# Installs mmcv with its compiled ops: install_mmcv.sh PYTHON
# pip takes a wheel where it finds one (PIP_FIND_LINKS, or its cache of an earlier build), else it compiles.
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
requirements=$(cd "$(dirname "${BASH_SOURCE[0]}")/../requirements" && pwd)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Left alone, mmcv's setup.py takes one core fewer than there are.
export MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
# torch's build looks for ninja on the PATH, not in the environment it runs in.
export PATH="$(dirname "$python"):$PATH"

# Shows ninja's [n/m] counters in place of the compiler's thousands of lines.
install() {
  set +e
  "$python" -m pip --disable-pip-version-check install -v --no-build-isolation \
    -c "$requirements/tested.txt" "$@" -r "$requirements/mmcv.txt" 2>&1 | tee "$log" |
    grep --line-buffered -oE '\[[0-9]+/[0-9]+\]|Building wheel for mmcv|(Using cached|Processing) [^ ]*mmcv[^ ]*whl|Successfully installed .*'
  local status=${PIPESTATUS[0]}
  set -e
  if [ "$status" -ne 0 ]; then
    tail -n 40 "$log" >&2
    echo 'error: mmcv could not be installed (see above); compiling it needs a C++ compiler (g++), the Python headers and about 2 GB of memory per core' >&2
    exit 1
  fi
}
has_ops() { "$python" -c 'import mmcv.ops' 2>/dev/null; }

if ! has_ops; then
  echo 'a ready wheel is used where pip finds one, else mmcv is compiled: about 14 minutes on two cores, once'
  install
fi
if ! has_ops; then
  echo 'that mmcv has no ops, or ops for another torch: compiling it for this one'
  install --force-reinstall --no-deps --no-cache-dir --no-binary mmcv
fi
"$python" -c 'import mmcv, mmcv.ops; print("mmcv", mmcv.__version__, "with compiled ops")'

#!/usr/bin/env bash
# Packs what a GPU machine that reaches no package registry lacks: pack_gpu.sh [FOLDER], by default .gpu
# The machine has requirements/gpu.txt's Python, torch and transformers. Here an environment of them is made
# in .venv-gpu, with mmcv's deformable attention and NMS compiled for CUDA, and what the machine lacks is
# copied out of it. There, in a checkout with the folder:
#     PYTHONPATH=$PWD/.gpu python3 tools/gpu_report.py
# TORCH_CUDA_ARCH_LIST names the card (9.0: H100 and H200), PYTHON the interpreter (python3.12).
set -euo pipefail
folder=$(realpath -m "${1:-.gpu}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
export VENV=${VENV:-.venv-gpu}
make() { command make STACK=gpu VENV="$VENV" ${PYTHON:+PYTHON="$PYTHON"} "$@"; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

make "$VENV/.torch"
python=$(realpath -s "$VENV/bin/python")
"$python" -m pip --disable-pip-version-check download --quiet --no-deps --no-build-isolation --no-binary mmcv \
  --dest "$work" -r requirements/mmcv.txt
"$python" tools/reduced_mmcv.py "$work"/mmcv-*.tar.gz "$work/reduced"
PIP_FIND_LINKS="${PIP_FIND_LINKS:-} $work/reduced" MMCV_WHEELS=$VENV/wheels make env
"$python" tools/carried.py "$folder"
strip --strip-unneeded "$folder"/mmcv/_ext.*.so
(cd "$folder" && PYTHONPATH=$folder "$python" -c 'import mmcv.ops; print("packed with CUDA", mmcv.ops.get_compiling_cuda_version())')
du -sh "$folder"

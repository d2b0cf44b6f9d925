# make demo   a Grounding DINO learns new objects through LoRA adapters, in minutes, on a CPU
# make test   lint and tests
# make gpu    where there is a GPU: its tests, the benchmarks and the demo; work_dirs/gpu/report.md
# make test-faults   kills, full disks, NaN and the like in real training processes; slow
# make env    the environment both use; nothing is redone when nothing changed
# make test STACK=onedl   the same on OneDL's line of mmcv, mmengine and mmdet
# make stack-lowest, make stack-highest   whether the package works on the oldest and the newest
#             versions that setup.py and the check at import allow; slow: builds an environment each
#
# PYTHON=  the interpreter that makes the environment     VENV=  where it lies
# STACK=   the versions in it: requirements/tested.txt, onedl.txt, lowest.txt, highest.txt or gpu.txt
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

STACK ?= tested
PYTHON_tested := python3.11
PYTHON_onedl := python3.11
PYTHON_lowest := python3.10
PYTHON_highest := python3.12
PYTHON_gpu := python3.12
PYTHON ?= $(shell command -v $(PYTHON_$(STACK)) || command -v python3)
VENV ?= $(if $(filter tested,$(STACK)),.venv,.venv-$(STACK))
PINS := requirements/$(STACK).txt
# mmcv's own, of the family that the pins are of.
MMCV := requirements/$(if $(filter onedl,$(STACK)),onedl-)mmcv.txt
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
STAMP := $(VENV)/.made
# What is checked: a config that somebody keeps beside them is none of ours.
SOURCES := configs mmdet_gdino_lora tests tools gdino_lora.py setup.py
# Nothing here talks to a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: env demo test test-faults gpu lint format check-stack stack-lowest stack-highest

env: $(STAMP)

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo 'error: no Python found; name one: make env PYTHON=/path/to/python3.11' >&2; exit 2; fi
	"$(PYTHON)" -m venv "$(VENV)"

# One stamp per step, so that a step that failed is where the next `make` goes on.
$(VENV)/.torch: requirements/build.txt $(PINS) | $(VENV)/bin/python
	@echo '[1/4] torch and build tools'
	$(PIP) install -r requirements/build.txt -c $(PINS)
	@touch $@

$(VENV)/.mmcv: $(MMCV) tools/install_mmcv.sh tools/build_progress.py $(VENV)/.torch
	@echo '[2/4] mmcv with its compiled ops'
	bash tools/install_mmcv.sh $(RUN) $(PINS) $(MMCV)
	@touch $@

$(VENV)/.stack: $(PINS) requirements/test.txt $(VENV)/.mmcv
	@echo '[3/4] mmdet, transformers, peft and what the tests need'
	$(PIP) install -r requirements/build.txt -r $(MMCV) -r $(PINS) -r requirements/test.txt
	@touch $@

$(STAMP): setup.py $(VENV)/.stack
	@echo '[4/4] this package'
	$(PIP) install --no-build-isolation -c $(PINS) -e .
	@touch $@

demo: env
	$(RUN) tools/demo.py

lint: env
	$(RUN) -m ruff check $(SOURCES)
	$(RUN) -m ruff format --check $(SOURCES)
	$(RUN) -m mypy mmdet_gdino_lora

format: env
	$(RUN) -m ruff check --fix $(SOURCES)
	$(RUN) -m ruff format $(SOURCES)

test: lint
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

gpu: env
	$(RUN) tools/gpu_report.py

test-faults: env
	OMP_NUM_THREADS=1 $(RUN) -W ignore -m tests.faults

check-stack: env
	$(RUN) tools/check_stack.py

stack-lowest stack-highest: stack-%:
	$(MAKE) check-stack STACK=$*

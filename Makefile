# make demo   a Grounding DINO learns new objects through LoRA adapters, in minutes, on a CPU
# make test   lint and tests
# make env    the environment both use; nothing is redone when nothing changed
#
# PYTHON=  the interpreter that makes the environment     VENV=  where it lies
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
STAMP := $(VENV)/.made
# Nothing here talks to a model hub.
export HF_HUB_OFFLINE := 1

.PHONY: env demo test lint format

env: $(STAMP)

$(VENV)/bin/python:
	@if [ -z "$(PYTHON)" ]; then echo 'error: no Python found; name one: make env PYTHON=/path/to/python3.11' >&2; exit 2; fi
	"$(PYTHON)" -m venv "$(VENV)"

# One stamp per step, so that a step that failed is where the next `make` goes on.
$(VENV)/.torch: requirements/build.txt | $(VENV)/bin/python
	@echo '[1/4] torch and build tools'
	$(PIP) install -r requirements/build.txt
	@touch $@

$(VENV)/.mmcv: requirements/mmcv.txt tools/install_mmcv.sh $(VENV)/.torch
	@echo '[2/4] mmcv with its compiled ops'
	bash tools/install_mmcv.sh $(RUN)
	@touch $@

$(VENV)/.stack: requirements/tested.txt requirements/test.txt $(VENV)/.mmcv
	@echo '[3/4] mmdet, transformers, peft and what the tests need'
	$(PIP) install -r requirements/build.txt -r requirements/mmcv.txt -r requirements/tested.txt -r requirements/test.txt
	@touch $@

$(STAMP): setup.py $(VENV)/.stack
	@echo '[4/4] this package'
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: env
	$(RUN) tools/demo.py

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: env
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

test: lint
	$(RUN) -m pytest -n 2 --dist loadfile

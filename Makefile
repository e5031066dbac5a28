# Every target needs Python 3.11 to 3.14 and nothing else: set-up goes into .venv.
#
#   make train      train the default config; settings in ARGS="--training.steps 10"
#   make test       lint, types and the fast part of the suite; ARGS="tests/sequence" for a part
#   make test-all   the same with the slow part, as CI runs it
#   make docs       build the documentation into build/site
#   make wheel      build sdist and wheel into dist, and check them
#   make gpu        the campaign on one GPU, 8 minutes; without one, what it would run

PYTHON ?=
NAMED := $(if $(PYTHON),"$(PYTHON)")
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
ARGS ?=
# Files whose tests need no ranks go to a worker as wholes, so that their fixtures are made once.
WORKERS := -n 2 --dist loadgroup --no-loadscope-reorder
# Types are checked beside the first tests, which do not fill all cores.
PYTEST := $(BIN)/mypy & $(BIN)/python -m pytest

# Local builds of torch (+cpu, +cu130) sort by name, so pip alone may take the wrong one of them.
# Where the wish cannot be met, the pinned version in whatever build there is will do.
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU'),0)
TORCH := torch==2.13.0+cpu
else
TORCH := torch==2.13.0,!=2.13.0+cpu
endif

.PHONY: train test test-all lint style docs wheel gpu clean

train: $(VENV)/train.stamp
	$(BIN)/python train.py $(ARGS)

test: style
	$(PYTEST) $(WORKERS) $(ARGS); tests=$$?; wait $$! && exit $$tests

test-all: style
	$(PYTEST) $(WORKERS) -m 'not gpu' $(ARGS); tests=$$?; wait $$! && exit $$tests

lint: style
	$(BIN)/mypy

style: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: $(VENV)/docs.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

wheel: $(VENV)/test.stamp
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

# Takes whichever Python has torch: a GPU machine without a network cannot make .venv.
gpu:
	$(or $(wildcard $(BIN)/python),python3) -m benchmarks.gpu $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/train.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing torch and torchtitan into $(VENV): a few minutes, 2 GB (5 with CUDA)'
	$(PIP) '$(TORCH)' 2>/dev/null || $(PIP) --constraint constraints.txt torch
	$(PIP) --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/test.stamp: $(VENV)/train.stamp
	@echo 'Installing what the tests need into $(VENV)'
	$(PIP) --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/docs.stamp: $(VENV)/train.stamp
	@echo 'Installing what builds the documentation into $(VENV)'
	$(PIP) --constraint constraints.txt --editable '.[docs]'
	touch $@

# torch 2.13.0 has no build for Python 3.15.
$(BIN)/python:
	@for python in $(or $(NAMED),python3 python3.14 python3.13 python3.12 python3.11 python); do \
	    if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info[1] not in range(11, 15))' \
	        >/dev/null 2>&1; then \
	        echo "$$python -m venv $(VENV)"; \
	        exec "$$python" -m venv $(VENV); \
	    fi; \
	done; \
	echo "make needs Python 3.11 to 3.14 with venv and pip, got $(or $(PYTHON),none on the PATH):" \
	    "install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

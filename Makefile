# make train and make test need Python 3.11 or newer and nothing else: set-up goes into .venv.

PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# Local builds of torch (+cpu, +cu130) sort by name, so pip alone may take the wrong one of them.
# Where the wish cannot be met, the pinned version in whatever build there is will do.
ifeq ($(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU'),0)
TORCH := torch==2.13.0+cpu
else
TORCH := torch==2.13.0,!=2.13.0+cpu
endif

.PHONY: train test clean

train: $(VENV)/train.stamp
	$(BIN)/python train.py $(ARGS)

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) *.egg-info .mypy_cache .pytest_cache .ruff_cache

$(VENV)/test.stamp: $(VENV)/train.stamp
	@echo 'Installing what the tests need into $(VENV)'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(VENV)/train.stamp: pyproject.toml constraints.txt | $(BIN)/python
	@echo 'Installing torch and torchtitan into $(VENV): a few minutes, some 2 GB'
	$(BIN)/python -m pip install --quiet '$(TORCH)' 2>/dev/null \
	    || $(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(BIN)/python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11 python; do \
	    if $$python -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' \
	        >/dev/null 2>&1; then \
	        echo "$$python -m venv $(VENV)"; \
	        exec $$python -m venv $(VENV); \
	    fi; \
	done; \
	echo "make needs Python 3.11 or newer with venv and pip, got none on the PATH:" \
	    "install one, or name it: make PYTHON=/path/to/python3" >&2; \
	exit 1

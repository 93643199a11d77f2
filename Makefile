# Every target sets itself up: the first one run finds a Python, makes .venv and installs the package into it.

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

# An interpreter counts only if it runs: pyenv leaves shims in PATH that fail when called.
IS_SUITABLE := import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] < (3, 14))
CANDIDATES = python3.13 python3.12 python3 $(wildcard $(HOME)/.pyenv/versions/3.1[2-9]*/bin/python)

# One thread per worker: two workers share two cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: help setup quickstart test test-all lint clean

help:
	@echo "make quickstart   refine the embedded titanium model, about 10 minutes on 2 cores"
	@echo "make test         the tests, without the slow ones"
	@echo "make test-all     all tests"
	@echo "make lint         style, types and import contracts"
	@echo "make clean        remove .venv and caches; results under runs/ stay"
	@echo "PYTHON=/path/to/python chooses the interpreter (3.12 or 3.13)."

setup: $(STAMP)

$(STAMP): pyproject.toml
	@python=; for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
	    if "$$candidate" -c '$(IS_SUITABLE)' >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.12 or 3.13 with venv found; tried: $(or $(PYTHON),$(CANDIDATES))." >&2; \
	    echo "Install one, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12" >&2; \
	    exit 2; \
	fi; \
	set -e; \
	if ! $(BIN)/python -c '$(IS_SUITABLE)' >/dev/null 2>&1; then \
	    echo "making $(VENV) with $$python"; \
	    "$$python" -m venv --clear $(VENV); \
	fi; \
	echo "installing into $(VENV), a few minutes the first time"; \
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/mlip-refine finetune configs/quickstart.yaml --resume

test: $(STAMP)
	$(PYTEST) -m "not slow"

test-all: $(STAMP)
	$(PYTEST)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find mlip_refine tests -name __pycache__ -type d -prune -exec rm -rf {} +

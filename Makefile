# `make demo` and `make test` start from nothing: each makes .venv first, and again only when
# pyproject.toml or constraints.txt has changed. pip's own settings (PIP_INDEX_URL and the like)
# are respected.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
# One process a core of a small machine; each keeps torch to one thread (tests/conftest.py).
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test faults lint format clean

help:  ## Show the targets.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)  ## Run the built-in federated fine-tuning, offline, from nothing.
	$(BIN)/alignfed simulate

test: lint  ## Run every check and the whole test suite, from nothing.
	HF_HUB_OFFLINE=1 $(BIN)/pytest -n $(WORKERS)

faults: $(STAMP)  ## Kill, cut off and attack real processes; twenty minutes and more.
	ALIGNFED_FAULTS=all HF_HUB_OFFLINE=1 $(BIN)/pytest tests/faults

lint: $(STAMP)  ## Run format, lint, type and import checks.
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## Format the code and mend what ruff can mend.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the virtual environment, caches and build outputs. Runs are kept.
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: without its version fixed, pip would fetch the newest one and
# gigabytes of GPU libraries with it before the constraint on our own package is read.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "alignfed needs Python 3.11 or newer: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

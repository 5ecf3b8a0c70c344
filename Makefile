# longspan: everything a person or CI does. `make help` lists it.
#
# PYTHON=...       the interpreter that .venv is made from (3.11 or newer)
# TORCH_INDEX=...  a package index to take torch from, for instance a CPU-only one where the default would bring CUDA

PYTHON ?= python3
TORCH_INDEX ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Build isolation is off so that the build back end, too, is the pinned one.
INSTALL := $(PIP) install --no-build-isolation -c constraints.txt

# One stamp per set of dependencies: a second `make demo` finds its stamp newer than both files and installs nothing.
RUN := $(VENV)/.stamp-run
DEV := $(VENV)/.stamp-dev
DOCS := $(VENV)/.stamp-docs

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help demo install install-dev install-docs test test-slow check lint format bench docs clean distclean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  PYTHON=python3.12 picks the interpreter, TORCH_INDEX=URL the index torch comes from (both: before .venv exists)"

demo: $(RUN)  ## install if needed, then train on real text over two ranks and write a report
	$(BIN)/longspan demo

install: $(RUN)  ## what `make demo` needs, and nothing run
install-dev: $(DEV)  ## what `make test` needs, and nothing run
install-docs: $(DOCS)  ## what `make docs` needs, and nothing run

test: $(DEV)  ## lint, types, and every test that is not slow
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest

test-slow: $(DEV)  ## the slow tests, and the GPU tests where there is a GPU
	$(BIN)/python -m pytest -m "slow or gpu" --timeout 1200 --hypothesis-profile thorough

check: $(DEV)  ## the quick part of `make test`: lint, types, structure of the package
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -q tests/test_structure.py

lint: $(DEV)  ## style only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)  ## rewrite files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(RUN)  ## measure on this machine
	$(BIN)/longspan bench

docs: $(DOCS)  ## build the documentation into site/
	$(BIN)/mkdocs build --strict

clean:  ## remove caches and build products (not .venv, not runs/)
	rm -rf site build dist .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests $(wildcard examples) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf $(VENV)

# torch goes first and alone: it is the one package with several builds. With TORCH_INDEX, its own dependencies come
# from the default index in the next step (an index for torch has other versions of them than those pinned).
$(RUN): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("longspan needs Python 3.11 or newer, $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.12" % v[:2])'
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt $(if $(TORCH_INDEX),--no-deps --index-url $(TORCH_INDEX)) torch
	$(PIP) install -c constraints.txt setuptools
	$(INSTALL) -e .
	@touch $@

$(DEV): $(RUN)
	$(INSTALL) -e '.[dev]'
	@touch $@

$(DOCS): $(RUN)
	$(INSTALL) -e '.[docs]'
	@touch $@

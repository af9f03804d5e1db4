# make demo    a real sweep on this machine's CPU, from text to plots, table and optimum
# make test    lint, types and every test
# make check   lint, types and the fast tests
# make gpu     the tests of what runs on a GPU alone, on a machine that has one
# make docs    the documentation as a site in site/, which opens without a server or a network
# make setup   the virtual environment in .venv/ that all of these use
# Each does nothing where nothing has changed.

PYTHON ?= python3
# Where a CPU-only build of torch is wanted, pass for example TORCH_ARGS="--index-url ..." or a wheel's folder.
TORCH_ARGS ?=
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
STAMPS := .stamps
SOURCES := $(shell find dlcm flops sweeps analysis -name '*.py' -o -name '*.yaml') pyproject.toml
TESTS := $(shell find tests benchmarks notebooks docs -type f -not -path '*/__pycache__/*' 2>/dev/null) README.md mkdocs.yml
# One thread a worker: two tests beside each other gain more than one test on two threads.
export OMP_NUM_THREADS ?= 1
# Tests start hundreds of interpreters, which read byte code faster than they make it.
unexport PYTHONDONTWRITEBYTECODE
# Of tests one worker more: many wait for much of their time, for processes and clusters.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: setup demo test check lint style types fast gpu docs clean clean-demo
.DELETE_ON_ERROR:

setup: $(STAMPS)/setup

$(STAMPS)/setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else f"error: Python {sys.version.split()[0]} found, 3.11 or newer needed; run make PYTHON=python3.12")'
	@echo "== environment in $(VENV) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH_ARGS) '$(TORCH)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@mkdir -p $(STAMPS) && touch $@

demo: $(STAMPS)/demo
	@cat runs/demo/report/summary.md
	@echo "== the demo stands in runs/demo: results.parquet, report/plots, report/tables (make clean-demo to run it anew)"

$(STAMPS)/demo: $(STAMPS)/setup $(SOURCES)
	@echo "== sweep: sweeps/recipes/demo.yaml -> runs/demo"
	@$(BIN)/dlcm sweep submit sweeps/recipes/demo.yaml --cluster local
	@echo "== results"
	@$(BIN)/dlcm sweep collect runs/demo
	@echo "== fits, optimum, plots, tables"
	@$(BIN)/dlcm analyze report runs/demo >/dev/null
	@mkdir -p $(STAMPS) && touch $@

test: $(STAMPS)/test

$(STAMPS)/test: $(STAMPS)/setup $(SOURCES) $(TESTS)
	@$(MAKE) --no-print-directory lint
	@echo "== tests"
	@$(BIN)/python -m pytest -n $$(( $(WORKERS) + 1 )) --dist worksteal
	@mkdir -p $(STAMPS) && touch $@

# Style and types take one processor for some seconds: side by side with the tests.
check: $(STAMPS)/setup
	@$(MAKE) --no-print-directory -j2 lint fast

lint: style types

style: $(STAMPS)/setup
	@echo "== lint and format"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(STAMPS)/setup
	@echo "== types"
	@$(BIN)/pyrefly check --progress-bar=no

fast: $(STAMPS)/setup
	@echo "== fast tests"
	@$(BIN)/python -m pytest -n $$(( $(WORKERS) + 1 )) --dist worksteal -m 'not slow and not cluster'

gpu: $(STAMPS)/setup
	@echo "== tests on a GPU"
	@TEST_GPU=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m gpu

docs: $(STAMPS)/setup
	@echo "== site"
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "== open site/index.html"

clean-demo:
	rm -rf runs/demo $(STAMPS)/demo

clean:
	rm -rf $(VENV) $(STAMPS) site .pytest_cache .ruff_cache

# loraweave: `make` alone lists what there is. Needs Python 3.11 or later with pip and venv; nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
OUT ?= out/demo
# Two workers, each with one thread: torch's own threads would fight over the cores.
PYTEST ?= OMP_NUM_THREADS=1 $(BIN)/python -m pytest
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint bench clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv with pinned versions, and install loraweave in it

demo: $(STAMP)  ## the main job on the bundled model and LoRAs; results in out/demo
	$(BIN)/loraweave demo --out $(OUT)

test: lint  ## lint, types and the test suite, without the slow tests
	$(PYTEST) -n $(WORKERS)

test-slow: $(STAMP)  ## the tests that take longer than a few seconds each
	$(PYTEST) -m slow || [ $$? -eq 5 ]  # 5: there are none

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(STAMP)  ## time loraweave against its peers (benchmarks/speed)
	$(BIN)/python benchmarks/speed/run.py -o out/speed.json --resume

clean:  ## remove the environment and all that was made
	rm -rf $(VENV) out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "loraweave needs Python 3.11 or later, but $(PYTHON) is %d.%d; try: make setup PYTHON=python3.11" % v[:2])'
	@test -x $(BIN)/python || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || \
		{ echo 'could not make $(VENV); on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@# torch by itself and pinned: a resolver left to choose takes the newest build, and with it gigabytes of CUDA.
	$(PIP) torch==2.13.0 setuptools
	@# With the pinned setuptools from above instead of the newest one in a build environment of its own.
	$(PIP) --no-build-isolation -e '.[dev]'
	@touch $@

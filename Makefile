# make train          a virtual environment, the package with pinned dependencies, and `fmegatron train quickstart`
# make test           the same environment; ruff, mypy, and the tests (each suite has a budget: tests/conftest.py)
# make test-all       the long tests too
# make test-versions  the tests on every other Python that is present; make test-versions TORCH=torch==2.11.0
# make test-wheel     builds the wheel, installs it in an empty environment, trains a few steps
# make equivalence    every preset on every mesh of 8 ranks against one device: a table and a picture
# make soak           runs that are killed at random moments until 60 kills are survived, see tests/faults/soak.py; ARGS=200
# make page           the report of a run, opened in a real browser (chromium or google-chrome, where one is in PATH)
# make bench          benchmarks/, side by side with peers
# make clean
#
# Variables, on the command line:
#   PYTHON=python3.12      the interpreter of a new environment; else the first of 3.11, 3.12, 3.13 that runs
#   TORCH=torch==2.13.0    what is installed as torch (a GPU machine: the build that fits its driver)
#   SYSTEM_TORCH=1         take the torch that PYTHON already has: the usual choice on a GPU machine
#   VENV=.venv             where the environment lies (SYSTEM_TORCH=1: .venv-system)
#   PIP_FLAGS=             further words for pip install, such as an index of CPU builds of torch
#   ARGS=                  further words for fmegatron train, or for pytest

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

TORCH ?= torch==2.13.0
VENV ?= .venv$(if $(SYSTEM_TORCH),-system)
PIP_FLAGS ?=
ARGS ?=
WORKERS ?= 2

RUNS := -c 'import sys, venv, ensurepip, ctypes, lzma, ssl; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1
PIP = $(BIN)/python -m pip -qq install --constraint constraints.txt $(PIP_FLAGS)
# One stamp for each choice of torch and each set of packages: a second make installs nothing.
CHOICE := $(if $(SYSTEM_TORCH),system,$(subst /,-,$(subst ==,-,$(TORCH))))
CORE := $(VENV)/installed-$(CHOICE)
TEST := $(VENV)/installed-$(CHOICE)-test
BENCH := $(VENV)/installed-$(CHOICE)-bench

.PHONY: train test lint test-core test-all test-versions wheel test-wheel bench equivalence soak clean constraints page
train: $(CORE)
	$(BIN)/fmegatron train quickstart $(ARGS)

test: lint test-core

lint: $(TEST)
	@echo "ruff, mypy"
	$(BIN)/ruff check --output-format concise .
	$(BIN)/mypy

test-core: $(TEST)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-all: lint
	HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "long or not long" $(ARGS)

# Python that is in PATH, or kept by pyenv; a shim that does not run is passed over.
test-versions:
	@for version in 3.11 3.12 3.13; do \
	  for python in "$$(command -v python$$version || true)" ~/.pyenv/versions/$$version.*/bin/python; do \
	    $$python $(RUNS) 2>/dev/null || continue; \
	    echo "== $$($$python --version) at $$python, $(CHOICE)"; \
	    $(MAKE) test-core VENV=.venv-$$version PYTHON=$$python; \
	    break; \
	  done; \
	done

wheel: $(TEST)
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	@ls -l dist/*.whl

# A folder of its own, so that nothing is found in the source tree.
test-wheel: wheel
	rm -rf build/wheel && mkdir -p build/wheel
	$(BIN)/python -m venv build/wheel/venv
	cd build/wheel && venv/bin/python -m pip -qq install --constraint ../../constraints.txt $(PIP_FLAGS) \
	  $(TORCH) ../../dist/fmegatron-*.whl
	cd build/wheel && venv/bin/fmegatron --help && venv/bin/fmegatron train debug --run.dir run && wc -l run/metrics.jsonl

bench: $(BENCH)
	$(BIN)/python benchmarks/train_step.py $(ARGS)

page: $(TEST)
	@command -v chromium chromium-browser google-chrome >/dev/null || { echo "make page: no chromium or google-chrome in PATH" >&2; exit 1; }
	$(BIN)/python -m pytest -m "long or not long" tests/train/test_page.py $(ARGS)

equivalence: $(TEST)
	$(BIN)/python experiments/equivalence/equivalence.py $(ARGS)

soak: $(TEST)
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py $(ARGS)

clean:
	rm -rf build dist *.egg-info .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis

constraints: $(TEST) $(BENCH)
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | grep -viE '^(torch|triton|fmegatron)\b' | sort -f; } > $@.new
	mv $@.new constraints.txt

# ------------------------------------------------------------------------------------------------ installation
$(BIN)/python:
	@python=""; for p in $(or $(PYTHON),python3.11 python3.12 python3.13 python3 ~/.pyenv/versions/3.1[123].*/bin/python); do \
	  if $$p $(RUNS) 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then echo "make: no Python of 3.11, 3.12 or 3.13 with venv runs here; name one: make PYTHON=..." >&2; exit 1; fi; \
	echo "$(VENV): $$($$python --version), from $$(command -v $$python)"; \
	$$python -m venv $(if $(SYSTEM_TORCH),--system-site-packages) $(VENV)

$(CORE): pyproject.toml constraints.txt | $(BIN)/python
	@rm -f $(VENV)/installed-*
ifdef SYSTEM_TORCH
	@$(BIN)/python -c 'import torch; print("torch", torch.__version__, "of the system")' \
	  || { echo "make: SYSTEM_TORCH=1, but the Python of $(VENV) sees no torch" >&2; exit 1; }
else
	@echo "installing $(TORCH), the largest part"
	@$(PIP) $(TORCH)
endif
	@echo "installing fmegatron and its dependencies"
	@$(PIP) --editable .
	@touch $@

$(TEST): $(CORE) constraints-oracles.txt
	@echo "installing what the tests need"
	@$(PIP) --editable '.[test]'
	@$(BIN)/python -m pip -qq install $(PIP_FLAGS) --no-deps --requirement constraints-oracles.txt
	@$(if $(findstring torch==2.11,$(TORCH)),$(BIN)/python -m pip -qq install $(PIP_FLAGS) 'numpy<2.4',:)  # Triton 3.6's interpreter
	@touch $@

$(BENCH): $(CORE)
	@echo "installing what the benchmarks need"
	@$(PIP) --editable '.[bench]'
	@touch $@

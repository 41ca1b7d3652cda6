# Everything needs Python 3.11+, pip, make and a C++ compiler; nvcc is used when found.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WEIGHTS := .models/smollm2-135m
PYTEST := $(BIN)/python -m pytest

.PHONY: demo test test-slow mutate lint gpu visit bench setup weights clean

setup: $(VENV)/.ready

# torch first and alone: pip then takes the build that fits this machine, and nothing replaces it.
$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV): a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(shell grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Hugging Face's kernels, beside the environment: a test runs with it and without it.
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --target $(VENV)/hf-kernels --upgrade kernels tomlkit
	@touch $@

# Real weights for the demo's second act and some tests; everything else works without them.
weights: $(VENV)/.ready
	@test -d $(WEIGHTS) || $(BIN)/python -m s1fast.recipes.fetch_smollm2 $(WEIGHTS) \
	  || echo "SmolLM2-135M could not be fetched: the demo ends after its first act, tests on real weights skip"

demo: weights
	@$(BIN)/s1fast demo

test: weights
	$(PYTEST) -q -m "not slow and not gpu" --durations=20

test-slow: weights
	$(PYTEST) -q -m "slow and not gpu" --durations=20

# Breaks the kernels in one place after another: some test must fail each time. 40 minutes.
mutate: $(VENV)/.ready
	$(BIN)/python tests/mutation_check.py

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a GPU, straight from the checkout with its own Python: nothing is installed.
# One result file, bench/results/<device>-<date>-<commit>.json, holds roofs and kernels.
gpu:
	$(PYTHON) -m pytest -q -W default -m gpu --durations=20
	$(MAKE) bench

# What bench/QUEUE.md asks of one GPU, in the order of worth: make visit SECONDS=560
SECONDS ?= 560
visit:
	$(PYTHON) -m s1fast.bench.visit --seconds $(SECONDS)

# By the environment that make test set up, where it did; else by the Python that is there.
bench:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m s1fast.bench.kernels

clean:
	rm -rf $(VENV) out build dist *.egg-info

# `make demo` and `make test` need Python 3.11 or newer, and the network once, for pip.
# PIP_FLAGS go to pip: an index with CPU builds of torch saves gigabytes without a GPU.
# PYTEST_FLAGS go to pytest: two workers of one thread each; without any, one process and two.

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?= -n 2 --dist loadscope
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) -c constraints.txt
INPUTS := pyproject.toml constraints.txt

.PHONY: demo test bench clean

demo: $(VENV)/demo.stamp
	$(BIN)/moeify demo

test: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.kernels.aot || test $$? = 2  # 2: it says what this machine lacks
	$(BIN)/python -m pytest -q $(PYTEST_FLAGS)

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Editable in both: after an edit of the sources there is nothing to install again.
$(VENV)/demo.stamp: $(INPUTS) | $(BIN)/python
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(INPUTS) | $(BIN)/python
	$(PIP) -e '.[dev,demo]'
	touch $@ $(VENV)/demo.stamp

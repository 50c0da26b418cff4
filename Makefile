# Each target sets up what it needs in .venv and then runs it. `make` alone lists the targets.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Real data for tests and experiments, where they lie beside the checkout; everything also runs without them.
ZOO_DATA ?= $(abspath $(wildcard ../shared/data))
ifneq ($(ZOO_DATA),)
export ZOO_DATA
endif
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help setup demo test bench sanitize lint clean

help:
	@echo "make demo   install into $(VENV) and run the main job on embedded data (no download)"
	@echo "make test   install into $(VENV) and run the tests, the linter and the type checker"
	@echo "make bench  install into $(VENV) and run every benchmark (quietest on an idle machine)"
	@echo "make sanitize   the tests of the ops on kernels built with the address and the thread sanitizer"
	@echo "make lint   ruff and mypy alone"
	@echo "make clean  remove $(VENV), caches and build folders"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What an installation depends on. The extra `test` holds all of `graph`, so that one installation serves both.
INPUTS := $(BIN)/python pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/src/* native/include/zoo/*)

$(VENV)/.installed: $(INPUTS)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[graph]"
	@touch $@

$(VENV)/.installed-test: $(INPUTS)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $(VENV)/.installed $@

setup: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python -m zoo.demo

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2

bench: $(VENV)/.installed-test
	$(BIN)/zoo bench all

sanitize: $(VENV)/.installed-test
	$(BIN)/python -m zoo.shared.ops.build --sanitize address --test
	$(BIN)/python -m zoo.shared.ops.build --sanitize thread --test

lint: $(VENV)/.installed-test
	$(BIN)/ruff check zoo shared tests benchmarks
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

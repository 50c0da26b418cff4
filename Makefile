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

.PHONY: help setup demo test test-pythons test-nerfstudio test-extras wheel test-wheel bench attack sanitize lint docs clean

help:
	@echo "make demo   install into $(VENV) and run the main job on embedded data (no download)"
	@echo "make test   install into $(VENV) and run the tests, the linter and the type checker"
	@echo "make test-pythons   the same with python3.10, python3.12, python3.13, those of them that are at hand"
	@echo "make test-nerfstudio   install nerfstudio into build/nerfstudio and run its plug-ins by ns-train"
	@echo "make test-extras   resolve every extra of pyproject.toml against the package index"
	@echo "make wheel  a wheel for this kind of machine, into dist"
	@echo "make test-wheel   the README's lines with that wheel, from an empty folder, at 80 columns"
	@echo "make bench  install into $(VENV) and run every benchmark (quietest on an idle machine)"
	@echo "make attack  hostile files, bundles and hubs, kills and flipped bits, for ATTACK_SECONDS (240)"
	@echo "make sanitize   the tests of the ops on kernels built with the address and the thread sanitizer"
	@echo "make lint   ruff and mypy alone"
	@echo "make docs   the documentation site, into build/site"
	@echo "make clean  remove $(VENV), caches and build folders"

$(BIN)/python:
	@mkdir -p build
	$(PYTHON) -m venv $(VENV)

# The kernels are compiled while the packages are installed. Without a compiler plain PyTorch runs instead.
KERNELS := $(wildcard native/src/* native/include/zoo/*)
INPUTS  := pyproject.toml constraints.txt
MAKEFLAGS += --jobs=2 --output-sync=none

$(VENV)/.kernels: CMakeLists.txt $(KERNELS) | $(BIN)/python
	@command -v cmake >/dev/null || $(BIN)/pip install --quiet cmake
	@PATH="$(abspath $(BIN)):$$PATH"; export PATH; \
	 if cmake -S . -B build/native -DZOO_OUTPUT_DIR=$(CURDIR)/build/native/lib >build/native.log 2>&1 \
	    && cmake --build build/native --parallel 2 >>build/native.log 2>&1; \
	 then cp build/native/lib/_zoo_native_* shared/ops/ 2>/dev/null \
	      || echo "no C++ compiler: without native kernels everything runs, more slowly"; \
	 else echo "the native kernels could not be built (build/native.log): everything runs, more slowly"; fi
	@touch $@

$(VENV)/.installed: $(INPUTS) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[graph,diffusion]"
	@touch $@

$(VENV)/.installed-test: $(INPUTS) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[test]"
	@touch $(VENV)/.installed $@

setup: $(VENV)/.installed $(VENV)/.kernels

demo: setup
	$(BIN)/python -m zoo.demo

test: $(VENV)/.installed-test $(VENV)/.kernels
	$(BIN)/python -m pytest -n 2

# Each in an environment of its own; interpreters elsewhere are named by their paths: make test-pythons PYTHONS="..."
PYTHONS ?= python3.10 python3.12 python3.13
test-pythons:
	@for python in $(PYTHONS); do \
	   if found=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null); \
	   then $(MAKE) test PYTHON=$$python VENV=build/python$$found || exit 1; \
	   else echo "$$python: not at hand, nothing was tested"; fi; done

NERF := build/nerfstudio
# Laid over $(VENV), whose packages it sees, and pinned in full: nothing is resolved.
$(NERF)/.installed: $(VENV)/.installed-test requirements-nerfstudio.txt
	$(PYTHON) -m venv $(NERF)
	$(BIN)/python -c "import sysconfig as s; print('import site; site.addsitedir(\"%s\")' % s.get_path('purelib'))" \
	  > $$($(NERF)/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/over.pth
	$(NERF)/bin/pip install --quiet --no-deps --ignore-installed --requirement requirements-nerfstudio.txt
	@touch $@

test-nerfstudio: $(NERF)/.installed $(VENV)/.kernels
	ZOO_NERFSTUDIO=1 $(NERF)/bin/python -m pytest tests/zoo/neural3d/test_nerfstudio.py

test-extras: $(VENV)/.installed-test
	$(BIN)/pip install --quiet uv
	ZOO_RESOLVE=1 $(BIN)/python -m pytest tests/test_extras.py

WHEEL := build/wheel
wheel: $(BIN)/python
	rm -rf dist && $(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

# Laid over $(VENV), whose packages it sees, but not the checkout that is installed there.
test-wheel: wheel $(VENV)/.installed-test
	rm -rf $(WHEEL) && $(PYTHON) -m venv $(WHEEL)
	$(BIN)/python -c "import sysconfig as s; print(s.get_path('purelib'))" \
	  > $$($(WHEEL)/bin/python -c "import sysconfig as s; print(s.get_path('purelib'))")/over.pth
	$(WHEEL)/bin/pip install --quiet --no-deps dist/*.whl
	$(WHEEL)/bin/python -m tests.wheel

bench: $(VENV)/.installed-test $(VENV)/.kernels
	$(BIN)/zoo bench all

ATTACK_SECONDS ?= 240
attack: $(VENV)/.installed-test
	$(BIN)/python -m tests.attack --seconds $(ATTACK_SECONDS)
	ZOO_FUZZ=500 $(BIN)/python -m zoo.shared.ops.build --sanitize address --test tests/shared/ops/test_invalid.py

sanitize: $(VENV)/.installed-test
	$(BIN)/python -m zoo.shared.ops.build --sanitize address --test
	$(BIN)/python -m zoo.shared.ops.build --sanitize thread --test

lint: $(VENV)/.installed-test
	$(BIN)/ruff check zoo shared tests benchmarks
	$(BIN)/mypy

$(VENV)/.installed-docs: $(INPUTS) | $(BIN)/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/stage.py build/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

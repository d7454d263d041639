# make demo   sets up the core alone and packs the model that ships inside, offline from there on
# make test   sets up everything a developer needs and runs all tests
# make check  formatting, lint, types
# make bench  speed and memory, as tables: SHAPE=1b|7b|13b, WORK=folder, LLAMA_CPP=its sources
# The first set-up compiles llama-cpp-python, which takes some minutes; pip keeps the result.

PYTHON ?= python3
VENV := .venv
DEMO := .venv-demo
# llama.cpp is compiled for the machine at hand; its quantizers do not depend on it.
PIP_INSTALL := -m pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: setup demo test check bench style clean

setup: $(VENV)/.stamp

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing; the first time this compiles llama-cpp-python (some minutes)"
	$(VENV)/bin/python $(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(DEMO)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DEMO)
	@echo "installing; the first time this compiles llama-cpp-python (some minutes)"
	$(DEMO)/bin/python $(PIP_INSTALL) .
	@touch $@

demo: $(DEMO)/.stamp
	$(DEMO)/bin/python $(PIP_INSTALL) --force-reinstall --no-deps .
	cd / && $(CURDIR)/$(DEMO)/bin/python -m medllm_pack.demo --out $(CURDIR)/dist/tiny

test: setup
	$(VENV)/bin/python -m pytest

check: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

SHAPE ?= 1b
WORK ?= build/bench-$(SHAPE)

bench: setup
	$(VENV)/bin/python benchmarks/kernels.py
	$(VENV)/bin/python -m benchmarks.merge
	$(VENV)/bin/python benchmarks/make_checkpoint.py --shape $(SHAPE) --out $(WORK) \
		--tokenizer examples/tiny/base/tokenizer.model
	$(VENV)/bin/python benchmarks/build.py $(WORK) $(if $(LLAMA_CPP),--llama-cpp $(LLAMA_CPP))
	$(VENV)/bin/python -m benchmarks.scaling $(WORK)

style: setup
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(DEMO) dist build .mypy_cache .pytest_cache .ruff_cache

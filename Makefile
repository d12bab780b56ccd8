# Everything a contributor or a CI machine runs. Needs Python >= 3.11, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
# Two workers of one thread each: with more threads than cores the small matrices of the tests run slower, not faster.
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install check lint types layers test test-portable demo notebooks bench studies clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Make .venv with the package and what its tests need (PYTHON=python3.12 chooses the interpreter)

# A stamp and not the folder: a folder's time says nothing about whether the installation inside came to its end.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[cpu,dev]'
# Its pins exclude releases that others here need, and the model that an example trains needs none of them.
	$(PIP) --no-deps litgpt
	touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) -e '.[cpu,dev,bench]'
# It pins a numpy that nothing here runs with, and a package that no longer imports; what is compared needs neither.
	$(PIP) --no-deps retro-pytorch==0.3.9
	touch $@

check: lint types layers ## Style, types and the direction of imports

lint: $(VENV)/.installed ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## mypy --strict
	$(BIN)/mypy

layers: $(VENV)/.installed ## The layering test alone
	$(BIN)/python -m pytest -q tests/test_layering.py

test: $(VENV)/.installed ## All tests; warnings are errors (FULL_STUDIES=1: studies at full length, as CI runs them)
	$(BIN)/python -m pytest -n $(WORKERS)

test-portable: $(VENV)/.installed ## Tests of learning and exactness with the kernels of other processors (SAMPLE=1: a minute of them)
	$(BIN)/python tests/portable.py $(if $(SAMPLE),--sample)

demo: $(VENV)/.installed ## Train, judge and align a small model on arithmetic, in minutes on a CPU
	$(BIN)/python examples/arithmetic_demo.py

notebooks: $(VENV)/.installed ## Execute every notebook
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=900 -o timeout=1200 notebooks

bench: $(VENV)/.installed-bench ## Measure every method against its peers, under an hour on a quiet machine (PAIRS=rows.jsonl: on your own pairs)
	$(BIN)/python benchmarks/run.py $(if $(PAIRS),--pairs $(PAIRS))

studies: $(VENV)/.installed-bench ## Run the studies in benchmarks/studies; takes hours
	$(BIN)/python benchmarks/run.py --studies

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dist runs lightning_logs .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

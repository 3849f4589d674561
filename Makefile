SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 15
EMOJI_MINUTES ?= 72
BENCH ?= $(filter-out turns peer_worker decoder_worker peer_quality quality_%,$(basename $(notdir $(wildcard scripts/bench/*.py))))
export PATH := $(CURDIR)/$(BIN):$(PATH)

help: ## Show this help
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/ready ## Create .venv and install unclip with everything the tests need

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'unclip needs Python 3.11 or newer; name one: make setup PYTHON=python3.12'; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: setup ## Train the whole chain on generated shapes and judge it (MINUTES=15 RUNS=runs/demo)
	scripts/demo.sh $(strip $(MINUTES) $(RUNS))

emoji: setup ## Train the whole chain on real pictures: emoji (EMOJI_MINUTES=72 of training)
	scripts/emoji.sh $(strip $(EMOJI_MINUTES) $(RUNS))

setup-slurm: ## Install a SLURM for the tests (Debian or Ubuntu, as root or by sudo); they start it themselves
	tests/slurm/cluster.sh install

test: setup ## Run the tests, two files at a time
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-slow: setup ## Run the tests that take minutes or fetch packages
	$(BIN)/python -m pytest -m slow

bench: setup .venv-peer/ready ## Measure against the peers, each in its own environment (BENCH="prior draws")
	@for name in $(BENCH); do echo "== $$name"; $(BIN)/python scripts/bench/$$name.py --quick; done

.venv-peer/ready: scripts/bench/peer-constraints.txt
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/python -m pip install --quiet --upgrade pip
	.venv-peer/bin/python -m pip install --quiet -c $< dalle2-pytorch setuptools
	@touch $@

docs: setup ## Build the documentation as a site: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'open site/index.html'

lint: setup ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Check types
	$(BIN)/pyright

format: setup ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove runs and caches; keeps .venv
	rm -rf runs data dist site .pytest_cache .ruff_cache .hypothesis

.PHONY: help setup setup-slurm demo emoji test test-slow bench docs lint types format clean

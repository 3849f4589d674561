SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
MINUTES ?= 15
EMOJI_MINUTES ?= 55
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

demo: setup ## Train the whole chain on generated shapes and judge it (MINUTES=15)
	scripts/demo.sh $(MINUTES)

emoji: setup ## Train the whole chain on real pictures: emoji (EMOJI_MINUTES=55 of training)
	scripts/emoji.sh $(EMOJI_MINUTES)

test: setup ## Run the tests
	$(BIN)/python -m pytest

test-slow: setup ## Run the tests that take minutes or fetch packages
	$(BIN)/python -m pytest -m slow

lint: setup ## Check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup ## Check types
	$(BIN)/pyright

format: setup ## Rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove runs and caches; keeps .venv
	rm -rf runs data dist .pytest_cache .ruff_cache .hypothesis

.PHONY: help setup demo emoji test test-slow lint types format clean

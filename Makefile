# One set of commands for people and CI. Needs Python >= 3.11 and make; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := $(VENV)/.clients
HOST ?= 127.0.0.1
PORT ?= 8180
MODEL ?=

.DEFAULT_GOAL := help
.PHONY: help setup serve chat test test-gpu lint format docs clean

help:  ## show these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## /\1\t/' | awk -F'\t' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install Tern into it (cheap when done)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else f"Tern needs Python 3.11 or newer, this is {sys.version.split()[0]}: run make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	@echo "Setting up $(VENV) and compiling the kernels (once, about two minutes) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

serve: setup  ## start the OpenAI-compatible server on the embedded model (or MODEL=...)
	@$(BIN)/tern serve $(MODEL) --host $(HOST) --port $(PORT)

chat: setup  ## talk to the embedded model (or MODEL=...) in this terminal
	@$(BIN)/tern chat $(MODEL)

test: setup $(CLIENTS)  ## run every test
	@$(BIN)/python -m pytest -n auto --dist loadfile
	@$(BIN)/python -m pytest -n auto --dist loadfile --clients tests/clients -W default

test-gpu: setup  ## run the tests of the GPU's kernels, and those that need a GPU, on this machine's
	@$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no NVIDIA GPU here: make test runs the kernels under an interpreter instead")'
	@$(BIN)/python -m pytest tests/ops/cuda
	@$(BIN)/python -m pytest -m gpu

$(CLIENTS): $(STAMP) tests/clients/requirements.txt
	@echo "Installing the clients that Tern is tested with (once, about two minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --requirement tests/clients/requirements.txt
	@touch $@

lint: setup  ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup  ## mend style
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

docs: setup  ## regenerate the command-line help in docs/cli.md
	@$(BIN)/python -m tern.cli.help_pages docs/cli.md

clean:  ## remove .venv and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help book test lint clean

help:  ## show this help
	@echo "Usage: make TARGET [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-6s %s\n", $$1, $$2 }' Makefile

.venv/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/python || { echo "Creating .venv"; $(PYTHON) -m venv .venv; }
	@echo "Installing the book and its tools into .venv (some minutes the first time)"
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[book,dev]"
	@touch $@

book: .venv/installed  ## run the chapters that changed (quick profile) and build the pages
	@$(BIN)/svae book

test: .venv/installed  ## run the tests, and the chapters against their stored outputs
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval --nbval-current-env tests notebooks

lint: .venv/installed  ## check style, and that notebooks hold outputs but no traces of their execution
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/nbstripout --verify --keep-output --keep-count --keep-id --extra-keys \
		"metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.widgets" notebooks/*.ipynb

clean:  ## remove what was built, and .venv
	rm -rf _build .venv svae_book.egg-info .pytest_cache .ruff_cache .hypothesis

# A fresh machine needs nothing but python3 (3.10 or newer) and make: every target sets the environment up first.

PYTHON ?= python3
# Pinned, because a bare `torch` may bring another build than the one the suite was run on. Override for your GPU.
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test test-slow check bench results clean

demo: .venv/installed
	$(BIN)/python -m training run configuration/recipe/demo.yaml

test: .venv/installed
	$(BIN)/python -m pytest

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mlinter modeling_memory_mosaic
	$(BIN)/python -m pytest

bench: .venv/installed
	$(BIN)/python benchmarks/speed.py --output benchmarks/speed.json

# Tables of the README from the committed result files.
results: .venv/installed
	$(BIN)/python -m training.result README.md

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[train,dev]"
	touch $@

clean:
	rm -rf .venv runs

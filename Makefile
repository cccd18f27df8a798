# `make demo` sets up and runs the demonstration; `make test` sets up and passes the tests; `make cover` tells what they cover.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test cover docs lint setup

setup: .venv/.installed

# What the demonstration needs, which all else has as well. What it imports is compiled then: most of it never is, and
# to compile everything takes longer than the rest of the installation.
.venv/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -e .venv/.installed || $(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[cli]'
	touch $@

# The self-test compiles the loops of maturation, which each of the processes of the tests would do again.
.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	PYTHONDONTWRITEBYTECODE= $(BIN)/immunonet doctor
	touch $@

# Compiled modules are kept, whatever the environment says: what starts later need not compile them again.
demo: .venv/.demo
	PYTHONDONTWRITEBYTECODE= $(BIN)/immunonet demo --out demo --json demo/results.json

test: lint
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 2

# A third slower.
cover: setup
	$(BIN)/python -m pytest --cov -n 2

# Needs no network but for what it installs; `site/index.html` is where it begins.
docs: setup
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: setup
	$(BIN)/ruff check src tests notebooks
	$(BIN)/ruff format --check src tests notebooks
	$(BIN)/mypy

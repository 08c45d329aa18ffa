# make demo      train a small translation model on this machine's CPU and look at the result
# make test      all tests with coverage;   make test-fast   without the slow ones
# make lint      ruff and mypy
# make install   the environment alone (the others do it by themselves)
#
# PYTHON   interpreter that .venv is made with (3.10 to 3.13):   make demo PYTHON=python3.12
# VENV     where the environment lies
# CONSTRAINTS   exact versions; CONSTRAINTS= (empty) takes the newest that pyproject.toml allows
# WORKERS   how many processes run tests; each starts up to four more (2)
# PYTEST_ARGS   more arguments for pytest:   make test PYTEST_ARGS='-x -k schedules'

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# A file's tests stay together, in their order: they share what is expensive to make.
PYTEST = $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.installed
CONSTRAIN := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))

.PHONY: help install demo test test-fast lint format clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

install: $(STAMP)

# One stamp, so that a second `make` installs nothing, and a changed requirement installs again.
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS)
	@$(BIN)/python -c '' 2>/dev/null || bash constraints/make_venv.sh "$(PYTHON)" "$(VENV)"
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(CONSTRAIN) --editable '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/s2s-scale demo

test: $(STAMP)
	rm -f .coverage .coverage.*
	$(PYTEST) --cov --cov-report=term --cov-report=json:.coverage.json $(PYTEST_ARGS)
	$(BIN)/python -m tests.support.coverage_gate .coverage.json --lines 90

test-fast: $(STAMP)
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The environment and the runs stay: they cost minutes.
clean:
	rm -rf build dist *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache

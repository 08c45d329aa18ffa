# make demo      train a small translation model on this machine's CPU and look at the result
# make test      all tests with coverage, in two lanes:
#                make test-cpu   the newest versions;   make test-fast   of these the quick ones
#                make test-xla   torch-xla, and the oldest versions that are supported
# make lint      ruff and mypy
# make docs      the documentation site, in site/
# make install   the environment of the first lane alone, make install-xla that of the second
#                (the others do it by themselves)
#
# PYTHON   interpreter that .venv is made with (3.10 to 3.13):   make demo PYTHON=python3.12
# VENV, XLA_VENV   where the environments lie
# CONSTRAINTS, XLA_CONSTRAINTS   exact versions; CONSTRAINTS= (empty) takes the newest that
#          pyproject.toml allows
# WORKERS   how many processes run tests; each starts up to four more (2)
# PYTEST_ARGS   more arguments for pytest:   make test PYTEST_ARGS='-x -k schedules'

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/cpu.txt
XLA_VENV ?= .venv-xla
XLA_CONSTRAINTS ?= constraints/xla.txt
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
XLA_BIN := $(XLA_VENV)/bin
# A file's tests stay together, in their order: they share what is expensive to make.
RUN_TESTS = -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder
STAMP := $(VENV)/.installed
XLA_STAMP := $(XLA_VENV)/.installed
CONSTRAIN := $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
XLA_CONSTRAIN := $(if $(XLA_CONSTRAINTS),--constraint $(XLA_CONSTRAINTS))
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
XLA_TESTS := tests/xla tests/multiprocess/test_backend_contract.py tests/unit
REPORTS := --cov-report=term --cov-report=json:.coverage.json
GATE := -m tests.support.coverage_gate .coverage.json --lines 90
# Run in the second lane alone.
XLA_FILES := $(wildcard s2s_scale/backends/xla/*.py)

.PHONY: help install install-xla demo test test-cpu test-xla test-fast lint format docs clean

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

install: $(STAMP)

install-xla: $(XLA_STAMP)

# One stamp, so that a second `make` installs nothing, and a changed requirement installs again.
$(STAMP): pyproject.toml setup.py $(CONSTRAINTS)
	@$(BIN)/python -c '' 2>/dev/null || bash constraints/make_venv.sh "$(PYTHON)" "$(VENV)"
	$(BIN)/python $(PIP_INSTALL) $(CONSTRAIN) --editable '.[dev]'
	@touch $@

$(XLA_STAMP): pyproject.toml setup.py $(XLA_CONSTRAINTS)
	@$(XLA_BIN)/python -c '' 2>/dev/null || bash constraints/make_venv.sh "$(PYTHON)" "$(XLA_VENV)"
	$(XLA_BIN)/python $(PIP_INSTALL) $(XLA_CONSTRAIN) --editable '.[xla,test-tools]'
	@touch $@

demo: $(STAMP)
	$(BIN)/s2s-scale demo

# The second lane's coverage is added to the first one's: neither runs every backend.
test: $(STAMP) $(XLA_STAMP)
	rm -f .coverage .coverage.*
	$(XLA_BIN)/python $(RUN_TESTS) --cov --cov-report= $(PYTEST_ARGS) $(XLA_TESTS)
	$(BIN)/python $(RUN_TESTS) --cov --cov-append $(REPORTS) $(PYTEST_ARGS)
	$(BIN)/python $(GATE)

test-cpu: $(STAMP)
	rm -f .coverage .coverage.*
	$(BIN)/python $(RUN_TESTS) --cov $(REPORTS) $(PYTEST_ARGS)
	$(BIN)/python $(GATE) --without $(XLA_FILES)

test-xla: $(XLA_STAMP)
	$(XLA_BIN)/python $(RUN_TESTS) $(PYTEST_ARGS) $(XLA_TESTS)

test-fast: $(STAMP)
	$(BIN)/python $(RUN_TESTS) -m 'not slow' $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Strict: a broken link or a reference to something that is gone is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "site/index.html; with search: $(BIN)/python -m mkdocs serve"

# The environment and the runs stay: they cost minutes.
clean:
	rm -rf build dist site *.egg-info .coverage .coverage.* .pytest_cache .mypy_cache .ruff_cache

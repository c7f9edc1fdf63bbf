# Two commands: `make demo` and `make test`. Both create .venv on first use; nothing outside this folder is touched.
PYTHON ?= python3
VENV   ?= .venv
# Test processes at a time, on two cores; many tests start up to four processes each, and many wait for a clock.
WORKERS ?= 3
PIP     = $(VENV)/bin/python -m pip
# What an installation compiles.
NATIVE  = $(wildcard harness/selection/native/*)

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(VENV)/bin/harness train quickstart

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
	$(MAKE) lint

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python tools/check_types.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if (3, 11) <= sys.version_info[:2] <= (3, 12) else "harness needs Python 3.11 or 3.12, this is " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt $(NATIVE) | $(VENV)/bin/python
	$(PIP) install -c constraints.txt -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

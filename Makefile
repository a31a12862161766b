# Two environments: the newest of everything, and the oldest transformers supported. Both are made at first use.
PYTHON ?= python3
NEW := .venv
OLD := .venv-oldest

.PHONY: demo test slow conformance oldest lint format

demo: $(NEW)/.installed
	$(NEW)/bin/python examples/demo.py

test: $(NEW)/.installed
	$(NEW)/bin/python -m pytest -n 2 -m "not slow"

slow: $(NEW)/.installed
	$(NEW)/bin/python -m pytest -n 2 -m slow

conformance: $(NEW)/.installed
	$(NEW)/bin/python conformance/run.py

oldest: $(OLD)/.installed
	$(OLD)/bin/python -m pytest -n 2 -m "not slow"

lint: $(NEW)/.installed
	$(NEW)/bin/ruff format --check .
	$(NEW)/bin/ruff check .

format: $(NEW)/.installed
	$(NEW)/bin/ruff format .
	$(NEW)/bin/ruff check --fix .

$(NEW)/.installed: CONSTRAINTS := constraints.txt
$(OLD)/.installed: CONSTRAINTS := constraints-oldest.txt
$(NEW)/.installed: constraints.txt setup.py
$(OLD)/.installed: constraints-oldest.txt setup.py

# torch first and alone: a later package must not choose another build of it.
%/.installed:
	$(PYTHON) -m venv $*
	$*/bin/pip install --quiet --upgrade pip
	$*/bin/pip install --quiet --constraint $(CONSTRAINTS) torch
	$*/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable ".[test]"
	touch $@

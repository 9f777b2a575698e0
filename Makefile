# Every target sets itself up: Python 3.11+, make and git are all a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
EVERY_CORE := --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test test-all test-min quality style docs dist clean

demo: .venv/ready
	$(BIN)/magdg demo

test: .venv/ready
	$(BIN)/python -m pytest $(EVERY_CORE) -m "not slow"

test-all: .venv/ready
	$(BIN)/python -m pytest $(EVERY_CORE) --durations=15 --cov --cov-report=term:skip-covered

quality: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

style: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# uv resolves and unpacks the 6 GB that torch brings several times faster than pip does.
.venv/ready: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[test]'
	touch $@

# Any warning is an error; the other variable silences a notice of the theme's authors.
docs: .venv/ready
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The lowest versions that setup.cfg allows, of what it names; of the rest what goes with them.
test-min: .venv-min/ready
	.venv-min/bin/python -m pytest $(EVERY_CORE) -m "not slow"

dist: .venv/ready
	UV=$(BIN)/uv PYTHON=$(BIN)/python .ci/dist

.venv-min/ready: setup.cfg pyproject.toml | .venv/ready
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .venv-min
	$(BIN)/uv pip install --quiet --python .venv-min/bin/python --resolution lowest-direct --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-min .venv-dist site dist build

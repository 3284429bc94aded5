PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all test-lowest lint format benchmark clean

# The environment is rebuilt when the dependencies change.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e ".[dev,samplers]"
	touch $@

# A second run reads what the first one compiled.
CACHE = JAX_COMPILATION_CACHE_DIR=.cache/jax JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0

demo: $(VENV)/installed
	$(CACHE) $(BIN)/python examples/eight_schools.py

test: $(VENV)/installed lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-all: $(VENV)/installed lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow or not slow"

test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q --no-compile --disable-pip-version-check -e ".[dev]" -c lowest.txt
	.venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/installed
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e ".[peers]"
	$(BIN)/python benchmarks/peers.py

clean:
	rm -rf .venv .venv-lowest .cache build dist .pytest_cache .mypy_cache .ruff_cache

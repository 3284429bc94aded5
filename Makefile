PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo test test-all test-lowest smoke lint format docs release benchmark benchmarks benchmark-guard clean

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
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(VENV)/installed lint
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow"

test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install -q --no-compile --disable-pip-version-check -e ".[dev]" -c lowest.txt
	.venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# A few tests on each of the other interpreters that are present.
SMOKE = tests/test_fit.py tests/test_fit_guide.py tests/test_kernel.py tests/test_serialization.py \
	tests/test_export.py

VERSION := $(shell $(PYTHON) -c 'import sys; print("{}.{}".format(*sys.version_info))')

smoke:
	for python in $$(.ci/interpreters $(filter-out $(VERSION),3.11 3.12 3.13)); do \
		venv=.venv-$$($$python -c 'import platform; print(platform.python_version())') && \
		$$python -m venv $$venv && \
		$$venv/bin/python -m pip install -q --no-compile --disable-pip-version-check -e . pytest && \
		$$venv/bin/python -m pytest -q -m smoke $(SMOKE) || exit 1; \
	done

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in build/site. Notebooks are executed when they or the package have changed.
docs: $(VENV)/installed
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e ".[docs]"
	$(CACHE) $(BIN)/python -m sphinx -W --keep-going -q -b html docs build/site

# Distributions in dist/, tried in an empty environment: all of a release but the upload.
release: $(VENV)/installed
	$(BIN)/python .ci/release.py

benchmark: $(VENV)/installed
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e ".[peers]"
	$(BIN)/python benchmarks/peers.py

# All of them, for hours; the page is build/benchmarks/index.md.
benchmarks: $(VENV)/installed
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e ".[peers,pymc]"
	$(BIN)/python benchmarks/run.py

# Minutes: fails where a ratio to flowjax has worsened by more than a quarter.
benchmark-guard: $(VENV)/installed
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -e ".[peers]"
	$(BIN)/python benchmarks/run.py --guard

clean:
	rm -rf .venv .venv-* .cache build dist .pytest_cache .mypy_cache .ruff_cache

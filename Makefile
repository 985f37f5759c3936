# Two commands: `make quickstart` trains, `make test` tests. Both create the environment in $(VENV) first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.ready  ## train four stages in four worker processes on real images, about two minutes
	$(BIN)/pipetrgl train configs/quickstart.yaml

# many tests wait for processes of their own: three files at a time keep two cores busy
test: $(VENV)/.ready-dev  ## every test
	$(BIN)/python -m pytest -n 3 --dist loadfile

lint: $(VENV)/.ready-dev  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and by its exact version: a range may bring gigabytes of CUDA packages
$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q $$(grep '^torch==' constraints.txt)
	$(BIN)/pip install -q -e '.[plot,images]'
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/pip install -q -e '.[dev]'
	@touch $@

clean:  ## remove the environment and caches; run folders stay
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache

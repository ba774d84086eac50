# Two commands matter: `make bench` runs the main job, `make test` passes the tests. Both set up what they need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
TESTS ?= not slow

.PHONY: setup bench test check format clean

setup: $(VENV)/ready

# The torch step comes first and chooses CPU or CUDA, so that no later step can pull a CUDA build by surprise.
$(VENV)/ready: pyproject.toml scripts/install_torch.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else f"error: Python 3.11 or 3.12 is needed, {sys.executable} is {sys.version.split()[0]}: run make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python scripts/install_torch.py
	$(BIN)/python -m pip install --quiet -e '.[embedded,dev]'
	touch $@

bench: setup
	$(BIN)/tritonmark bench $(ARGS)

# Tests that measure time have the machine to themselves, the others share it. With ARGS: those that they choose.
test: setup
ifeq ($(ARGS),)
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist loadfile -m "not alone and ($(TESTS))"
	$(BIN)/python -m pytest -m "alone and ($(TESTS))"
else
	$(BIN)/python -m pytest $(ARGS)
endif

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy loadgen/core
	$(BIN)/python docs/check.py
	$(BIN)/python -m grafana --check

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build *.egg-info

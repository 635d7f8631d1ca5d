# make demo: everything from nothing to a report; make test: the tests. Both make their environment first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
POPULATION ?= 100000

.PHONY: demo test test-all lint format clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[demo,dev,tensorboard]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python data_tools/places.py --min-population $(POPULATION) --out runs/places.tsv
	$(BIN)/mach prepare runs/places.tsv --out runs/places --max-features 40000
	$(BIN)/mach compare runs/places --out runs/demo --config experiments/demo/config.toml
	$(BIN)/mach ask runs/demo/hashed "Nueva York" "Londres" "ロンドン"

test: $(VENV)/.installed
	$(BIN)/pytest

test-all: $(VENV)/.installed
	$(BIN)/pytest -m ''

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

# make demo: everything from nothing to a report; make test: the tests. Both make their environment first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
POPULATION ?= 100000
HOROVOD_VENV ?= .venv-horovod
HOROVOD_BIN := $(HOROVOD_VENV)/bin

.PHONY: demo test test-all test-horovod lint format clean

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
	$(BIN)/pytest --hypothesis-profile=ci --numprocesses=auto --maxprocesses=4 --dist=worksteal  # the same examples each time

test-all: $(VENV)/.installed
	$(BIN)/pytest -m ''  # new examples, in one process: some measure memory

$(HOROVOD_VENV)/.installed: pyproject.toml .ci/cxx17
	$(PYTHON) -m venv $(HOROVOD_VENV)
	$(HOROVOD_BIN)/pip install --quiet --disable-pip-version-check $(TORCH) wheel packaging setuptools
	HOROVOD_WITH_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_MPI=1 \
	CXX=$(CURDIR)/.ci/cxx17 MAKEFLAGS=-j2 \
	$(HOROVOD_BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps horovod==0.28.1
	$(HOROVOD_BIN)/pip install --quiet --disable-pip-version-check -e '.[dev,horovod]'
	touch $@

# Builds Horovod beside torch in an environment of its own (minutes; needs cmake and g++), and tests what uses it.
test-horovod: $(HOROVOD_VENV)/.installed
	$(HOROVOD_BIN)/pytest -m '' tests/parallel/test_horovod.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) $(HOROVOD_VENV) runs .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Two commands are all a newcomer needs: `make demo` and `make test`. Both set everything up first.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Small matrices on few cores: BLAS threads would wait for each other.
ONE_THREAD := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1

.PHONY: demo test check bench clean
.DEFAULT_GOAL := test

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(READY)
	$(BIN)/python examples/make_adapter.py out/demo
	$(BIN)/loralens inspect out/demo
	$(BIN)/loralens spectrum out/demo

test: $(READY)
	$(ONE_THREAD) $(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)
	$(BIN)/python -m benchmarks

clean:
	rm -rf out build dist benchmarks/data .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage *.egg-info

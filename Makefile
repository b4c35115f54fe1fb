# everything runs in this virtual environment; each target installs what it needs and no more
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# where make evidence leaves its comparisons, records and pages
EVIDENCE ?= comparisons/evidence
CONSTRAINTS ?= constraints.txt
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# the Python of make test-oldest, by its path where it is not found by this name
OLDEST_PYTHON ?= python3.12
# the Python of make test-jax-newest, which wants 3.12 or later
NEWEST_JAX_PYTHON ?= python3.12
# a process of one thread for each core; those of one file run in one process, which starts what they share once
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile
# the tests of duotone.jax and duotone.keras have virtual environments of their own
JAX_TESTS := tests/jax src/duotone/jax
KERAS_TESTS := tests/keras src/duotone/keras
KERAS_BACKENDS := tensorflow jax torch
# tests start many processes, each of which would compile every module again
export PYTHONDONTWRITEBYTECODE =

.PHONY: train compare test test-jax test-jax-newest test-keras test-keras-newest test-keras-here test-slow test-gpu test-torch test-models test-oldest test-newest soak soak-ranks check format bench gpu bench-jax bench-jax-compiled bench-keras docs evidence clean

train: $(VENV)/.installed  ## train the default task in BF16 with FP32 masters
	$(BIN)/duotone train

compare: $(VENV)/.installed  ## the default task in FP32, under torch.amp, and under two policies, with a page; about ten minutes
	$(BIN)/duotone compare

test: $(VENV)/.installed-test  ## the tests, README's examples and every docstring's among them
	$(PYTEST) $(addprefix --ignore=,$(JAX_TESTS) $(KERAS_TESTS))

test-jax:  ## the tests of duotone.jax on JAX 0.10, in .venv-jax
	$(MAKE) VENV=.venv-jax CONSTRAINTS=constraints-jax.txt .venv-jax/.installed-test-jax
	.venv-jax/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile $(JAX_TESTS)

test-jax-newest: .venv-jax-newest/.installed  ## the same on the newest JAX, in .venv-jax-newest, which has no torch
	.venv-jax-newest/bin/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist loadfile $(JAX_TESTS)

test-keras:  ## the tests of duotone.keras on Keras 3.15, on each backend in a process of its own, in .venv-keras
	$(MAKE) VENV=.venv-keras CONSTRAINTS=constraints-keras.txt test-keras-here

test-keras-newest:  ## the same on the newest Keras, in .venv-keras-newest
	$(MAKE) VENV=.venv-keras-newest test-keras-here

test-keras-here: $(VENV)/.installed-test-keras
	for backend in $(KERAS_BACKENDS); do \
	  echo "Keras on $$backend"; KERAS_BACKEND=$$backend $(PYTEST) $(KERAS_TESTS) || exit 1; \
	done

test-slow: $(VENV)/.installed-test  ## the tests that take minutes
	$(PYTEST) -m "slow and not gpu"

test-gpu: $(VENV)/.installed-test  ## the tests that need a CUDA device
	$(BIN)/python -m pytest -q -m gpu tests/torch

test-models: $(VENV)/.installed-models  ## train 40 public architectures as under torch.amp; about five minutes on two cores
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 -m models tests/models

test-torch: $(VENV)/.installed-test  ## the tests of duotone.torch alone
	$(PYTEST) tests/torch

test-oldest:  ## the same on Python 3.12 and the oldest torch, NumPy, Numba and Triton, in .venv-oldest; downloads gigabytes
	$(MAKE) VENV=.venv-oldest PYTHON=$(OLDEST_PYTHON) CONSTRAINTS=constraints-oldest.txt test-torch

test-newest:  ## the same on the newest torch, in .venv-newest; downloads gigabytes
	$(MAKE) VENV=.venv-newest CONSTRAINTS=constraints-newest.txt test-torch

soak: $(VENV)/.installed-test  ## kill training runs 50 times, resume them, compare every bit; about ten minutes
	$(BIN)/python benchmarks/soak.py

soak-ranks: $(VENV)/.installed-test  ## the same with one of two ranks killed, 12 times
	$(BIN)/python benchmarks/soak.py --ranks 2

check: $(VENV)/.installed-dev  ## style, types, and the rules of the layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q tests/test_layout.py

format: $(VENV)/.installed-dev  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-test  ## measure the step, averages, casting, its calls and attention, about seven minutes on two cores
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/average.py
	$(BIN)/python benchmarks/casting.py
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/attention.py

gpu: $(VENV)/.installed-test  ## first light on a GPU: at most six minutes, what is worth most first; GPU="--short" or "--dry"
	$(BIN)/python benchmarks/gpu.py $(GPU)

bench-jax:  ## a GPT in JAX against Flax, jmp and Optax, about ten minutes on two cores
	$(MAKE) VENV=.venv-jax CONSTRAINTS=constraints-jax.txt .venv-jax/.installed-test-jax
	.venv-jax/bin/python benchmarks/jax_training.py
	.venv-jax/bin/python benchmarks/jax_casting.py

bench-jax-compiled: .venv-jax-newest/.installed  ## what XLA makes of duotone.jax for a GPU and a TPU, without either; five minutes
	.venv-jax-newest/bin/python -m pip install --quiet --disable-pip-version-check "jax[cuda12-local]" "jax[tpu]"
	.venv-jax-newest/bin/python benchmarks/jax_compiled.py --evidence

bench-keras:  ## what goes wrong in Keras' mixed precision, beside Duotone's results, on three backends; about five minutes
	$(MAKE) VENV=.venv-keras CONSTRAINTS=constraints-keras.txt .venv-keras/.installed-test-keras
	.venv-keras/bin/python benchmarks/keras_faults.py

docs: $(VENV)/.installed-docs  ## build the pages into build/docs; a warning is an error
	$(BIN)/sphinx-build --quiet --fail-on-warning --builder html docs build/docs
	@echo build/docs/index.html

evidence: $(VENV)/.installed-peers  ## make the comparisons behind README's evidence, about 40 minutes on two cores
	$(BIN)/python benchmarks/evidence.py --out $(EVIDENCE)

clean:  ## remove the virtual environments and caches
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-jax .venv-jax-newest .venv-keras .venv-keras-newest .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) --editable ".[test]"
	touch $@

$(VENV)/.installed-test-jax: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) --editable ".[test-jax]"
	touch $@

$(VENV)/.installed-test-keras: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) --editable ".[test-keras]"
	touch $@

# duotone.jax never loads torch, so this environment goes without
.venv-jax-newest/.installed: pyproject.toml
	$(NEWEST_JAX_PYTHON) -m venv .venv-jax-newest
	.venv-jax-newest/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
	  jax optax flax equinox orbax-checkpoint msgspec numpy pyyaml rich typer hypothesis ml_dtypes pytest pytest-xdist
	.venv-jax-newest/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@

# timm asks for torchvision, whose wheels fit one build of torch each; the tests do without
$(VENV)/.installed-models: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) --editable ".[test,models]"
	$(PIP) --no-deps "timm>=1.0.20"
	touch $@ $(VENV)/.installed-test

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) --editable ".[dev]"
	touch $@ $(VENV)/.installed-test

$(VENV)/.installed-docs: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) --editable ".[docs]"
	touch $@

$(VENV)/.installed-peers: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP) --editable ".[test,peers]"
	touch $@

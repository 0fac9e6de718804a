# make train   a model that learns to write stories, in minutes, on any machine
# make test    every gradient proven
# Both need only python3 (3.10 or newer) with venv. PYTHON=python3.12 chooses another one.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Triton's version on current Hopper machines: the gate compiles kernels with it too.
TRITON_PINNED := 3.6.0
export TOKENIZERS_PARALLELISM ?= false

.PHONY: train test test-slow test-versions check gate bench docs test-reliability clean

# PASSIVE: threads that wait for each other sleep. On a machine that is busy with other work too,
# spinning ones were measured to be five times slower.
train: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(PY) train.py

# One thread a process: pytest-xdist starts a process a core. A process interprets kernels or compiles
# them (tests/conftest.py), hence two runs.
test: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto tests/gate tests/gpu

test-slow: $(VENV)/.installed-test
	$(PY) -m pytest -m slow
	$(PY) -m pytest -m slow tests/gate tests/gpu

# The fast tests with the oldest torch that pyproject.toml allows and with the newest there is, each
# in an environment that is thrown away. TORCH_FROM= (empty) takes PyPI's builds instead of CPU ones.
TORCH_VERSIONS ?= torch==2.11.* torch
TORCH_FROM ?= --extra-index-url https://download.pytorch.org/whl/cpu
test-versions:
	set -e; for torch in $(TORCH_VERSIONS); do \
		rm -rf $(VENV)-versions; $(PYTHON) -m venv $(VENV)-versions; \
		$(VENV)-versions/bin/pip install --quiet "$$torch" $(TORCH_FROM); \
		$(VENV)-versions/bin/pip install --quiet --editable ".[test]"; \
		$(VENV)-versions/bin/python -c "import torch; print('torch', torch.__version__)"; \
		OMP_NUM_THREADS=1 $(VENV)-versions/bin/python -m pytest $(PYTEST_OPTIONS); \
	done; rm -rf $(VENV)-versions

check: $(VENV)/.installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Every kernel compiled for six architectures of NVIDIA and two of AMD, and held to their limits; writes
# docs/kernels.md and the record that `make test` compares the kernels with. What is unchanged is not
# compiled again.
gate: $(VENV)/.installed-test
	PYTHONPATH=$(VENV)/triton-$(TRITON_PINNED) $(PY) -W ignore -m tools.gate --write
	$(PY) -W ignore -m tools.gate --arch 90 --write

# The benchmarks of this machine, and the tables and figures of docs/benchmarks.md.
bench: $(VENV)/.installed-test
	$(PY) -m pytest benchmarks/test_bench.py --benchmark-autosave --record benchmarks/results
	$(PY) -m benchmarks report

# Every promise of docs/reliability.md in its long form; writes what was counted to tests/reliability.md.
test-reliability: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m tests.support.promises

# The site in build/docs. A broken link is an error.
docs: $(VENV)/.installed-test
	$(PY) -m sphinx -q -W --keep-going docs build/docs

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[test,check]"
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps \
		--target $(VENV)/triton-$(TRITON_PINNED) triton==$(TRITON_PINNED)
	touch $@ $(VENV)/.installed

# `make train` on a new machine: an environment, the data, and the tour. See `make help`.

PYTHON ?= python3
VENV_PYTHON := .venv/bin/python

# A stamp says that an installation ended. It counts only while the environment's Python runs:
# one that was interrupted, or whose base Python has gone, is made anew.
WORKS := $(VENV_PYTHON) -c 'import pip' 2>/dev/null
REMAKE := $(shell $(WORKS) || echo remake)

BEGUN := $(shell date +%s)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help train plan test mutants mutate test-steps test-hosts chaos lint bench speedrun bench-gpu clean remake environment

help:  ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

train: plan environment .venv/.installed  ## Install, prepare data, prove, train for three minutes, sample
	@echo "[1/5] took $$(($$(date +%s) - $(BEGUN))) s"
	@echo
	@$(VENV_PYTHON) -m rosetrainer tour

environment:
	@echo "[1/5] environment: .venv, with torch and what else requirements.txt names"
	@echo

plan:
	@echo "Five stages:"
	@echo "  1  environment   .venv with torch: minutes the first time, then nothing"
	@echo "  2  data          the English prose that your Python carries: 5 s once, then nothing"
	@echo "  3  proof         who holds what, and is it the same as one process? 10 s"
	@echo "  4  training      a small GPT on two ranks, tensor-parallel, on CPU: about 3 minutes"
	@echo "  5  sample        text that it writes: 10 s"
	@echo

# More than cores, for a test of ranks waits more than it computes. Each takes up to 1 GB.
WORKERS := 5
PYTEST := $(VENV_PYTHON) -m pytest -q -n $(WORKERS) --dist worksteal --durations=15

# Compiled before: hundreds of processes import them, and none of those writes what it compiled.
test: .venv/.installed-dev  ## Run all tests but the planted mistakes: about ten minutes on two cores
	@$(VENV_PYTHON) -m compileall -q benchmarks data rosetrainer steps tests
	@echo "All tests: about ten minutes on two cores, more beside other work. Ends with the slowest."
	$(PYTEST) -m "not mutant"

mutants: .venv/.installed-dev  ## Plant each known mistake, see its test turn red: four minutes
	@$(VENV_PYTHON) -m compileall -q benchmarks data rosetrainer steps tests
	$(PYTEST) -m mutant

# The same command goes on where it was stopped; another SEED draws others. See tests/mutate.py.
BUDGET := 30m
SEED := 1

mutate: .venv/.installed-dev  ## Change the core by machine, count what no test notices: BUDGET=30m SEED=1
	@$(VENV_PYTHON) tests/mutate.py --budget $(BUDGET) --seed $(SEED)

test-steps: .venv/.installed-dev  ## Run each step's tests and a short training by torchrun
	$(VENV_PYTHON) steps/steps.py rehearse

test-hosts: .venv/.installed-dev  ## Train on two hosts made of network namespaces; needs root on Linux
	HOSTS=1 $(VENV_PYTHON) -m pytest -q -rs tests/launch/test_hosts.py

chaos: .venv/.installed-dev  ## Interrupt, damage and starve hundreds of runs: the whole fault matrix
	CHAOS=1 $(VENV_PYTHON) -m pytest -q tests/faults

lint: .venv/.installed-dev  ## Check style and types
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

# benchmarks/NAME.py, each a comparison with a table of its own.
BENCHMARKS := tokens_per_second roofline tensor_parallel start_up loss_memory sharded growth

bench: .venv/.installed-dev  ## Measure speed against what else one could pick: about half an hour
	BENCH=1 $(VENV_PYTHON) -m pytest -q tests/test_benchmarks.py tests/test_gpu_benchmark.py \
		tests/hardware/test_block_compile.py
	@for name in $(BENCHMARKS); do $(VENV_PYTHON) benchmarks/$$name.py || exit 1; done

speedrun: .venv/.installed-dev data/shakespeare-chars/meta.json  ## nanoGPT's laptop demo against ours: ten minutes to half an hour
	$(VENV_PYTHON) benchmarks/speedrun.py

# TEXT=FILE takes tiny-shakespeare from a file; without it, it is downloaded.
data/shakespeare-chars/meta.json: .venv/.installed
	$(VENV_PYTHON) data/prepare.py shakespeare $(TEXT) --tokenizer chars --out data/shakespeare-chars

bench-gpu: .venv/.installed-dev  ## Measure a GPU: GPT-2 1.5B and 124M, a Llama of 1B, under eight minutes
	$(VENV_PYTHON) benchmarks/gpu.py

clean:  ## Remove caches and builds; leaves .venv, out and the data
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Nothing to do where the environment's Python runs; else an error is one line, not a traceback.
define make_environment
@$(WORKS) || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1 | tail -n 1); rosetrainer needs" \
		"Python 3.10 or newer, for example: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
@$(WORKS) || $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu:" \
		"sudo apt-get install python3-venv" >&2; exit 1; }
@$(WORKS) || $(PYTHON) -m venv --clear .venv
endef

PIP_INSTALL := $(VENV_PYTHON) -m pip install --disable-pip-version-check

# On Linux the usual index has torch with CUDA, ten times the size. Where there is no GPU, torch for
# CPUs is taken, unless the user has chosen an index, which is never added to, or it is out of reach.
CPU_INDEX := https://download.pytorch.org/whl/cpu
REACHED := $(VENV_PYTHON) -c 'import signal, sys, urllib.request; signal.alarm(10); \
	urllib.request.urlopen(sys.argv[1] + "/torch/").close()' $(CPU_INDEX) 2>/dev/null
define choose_torch
case "$$(uname -s) $$(timeout 20 nvidia-smi -L 2>/dev/null)" in \
"Linux GPU "*) echo "nvidia-smi shows a GPU: torch with CUDA, about 3 GB to download." ;; \
"Linux "*) \
	if $(VENV_PYTHON) -m pip config list 2>/dev/null | grep -E '(index-url|no-index)=' >/dev/null; then \
		echo "nvidia-smi shows no GPU; torch is taken from where your pip settings say."; \
	elif $(REACHED); then \
		echo "nvidia-smi shows no GPU: torch for CPUs, 0.3 GB to download, from $(CPU_INDEX)"; \
		index="--extra-index-url $(CPU_INDEX)"; \
	else \
		echo "nvidia-smi shows no GPU, but $(CPU_INDEX), which has torch for CPUs alone, is out"; \
		echo "of reach: torch from pip's usual index, with CUDA, about 3 GB to download."; \
	fi ;; \
*) echo "torch for this system, 0.3 GB to download." ;; \
esac
endef

.venv/.installed: requirements.txt $(REMAKE)
	$(make_environment)
	@echo "Installing torch and what else requirements.txt names into .venv, once: a few minutes."
	@index=; $(choose_torch); echo; $(PIP_INSTALL) $$index -r requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	@echo "Installing what requirements-dev.txt names into .venv, once: a minute, a 0.1 GB download."
	@$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@

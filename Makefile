# What a person runs in a clone. `make` alone lists it. Needs Python 3.11 or newer, nothing else.

PYTHON ?= python3
VENV ?= .venv
# Pinned versions; empty (`make install CONSTRAINTS=`) takes the newest that pyproject.toml allows, CUDA builds included.
CONSTRAINTS ?= constraints.txt
# Passed to `python -m venv`; --system-site-packages keeps a torch that is installed already.
VENV_FLAGS ?=
PIP_FLAGS ?=
# screenshots: the run whose report is shown.
RUN ?= runs/shakespeare
# figures: benchmarks to run first (or all), and the folder of published measurements that some of them need.
MEASURE ?=
DATA ?=
# test-slurm: CI leaves out the tutorial.
SLURM_TESTS ?= tests/test_slurm.py tests/test_slurm_hosts.py tests/test_tutorials.py
# test-hosts: CI leaves out the benchmark of faults.
HOSTS_TESTS ?= tests/test_hosts.py tests/test_hosts_faults.py
# test-next: the newest megatron-core needs Python 3.12.
NEXT_PYTHON ?= python3.12
NEXT_VENV ?= .venv312
# test: processes among which the test files are dealt out. The tests of a file stay together, for what they share.
WORKERS ?= 2
# gpu-check: folder for the results, and a folder of wheels (`make gpu-wheels`) for a machine without network.
OUT ?= benchmarks/results
WHEELS ?=
# gpu-ranks: libnccl.so.2 of NCCL 2.31 or newer, where torch brought an older one.
NCCL_LIBRARY ?=

BIN := $(VENV)/bin
# Byte code is written, also where the environment says that nobody does: ranks start 4 times as fast.
unexport PYTHONDONTWRITEBYTECODE
# What processes of a job import, compiled once at install.
IMPORTED := copus.backends.megatron.backend, copus.backends.deepspeed.backend, copus.worker, copus.data.__main__, launch.cli, launch.plot, launch.report.render, \
	torch._dynamo, torch.distributed.run
INSTALLED := $(VENV)/.installed
GPU_SITE := build/gpu-site
NEXT_TESTS := groups layouts moves noise_sources step shard_table sharded_checkpoint async_checkpoints
RANK_TESTS := reshard_execute oom_recovery moves move_back noise_sources
GPU_PACKAGES := megatron-core pydantic pydantic-core annotated-types typing-inspection typing-extensions \
	click

.DEFAULT_GOAL := help
.PHONY: help install install-next demo test test-next test-slow test-slurm test-hosts lint format reference figures screenshots docs gpu-check gpu-ranks gpu-wheels clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(INSTALLED)  ## make .venv with the pinned dependencies and copus itself, editable

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit("copus needs Python 3.11 or newer, and $(PYTHON) is %d.%d: make PYTHON=python3.11" \
	% sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@echo "installing into $(VENV) (about a minute where pip has the wheels cached)"
	$(BIN)/python -m pip install --quiet --no-compile $(addprefix --constraint ,$(CONSTRAINTS)) $(PIP_FLAGS) --editable '.[dev]'
	@$(BIN)/python -W ignore -c 'import $(IMPORTED)'
	@touch $@

demo: install  ## train the main job on Shakespeare: 2 ranks, about 10 minutes
	$(BIN)/copus submit examples/shakespeare.yaml

test: install  ## the default test suite
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder --durations=15 --durations-min=8

install-next:  ## make .venv312: Python 3.12 and the newest megatron-core (5 GB)
	$(MAKE) --no-print-directory install PYTHON=$(NEXT_PYTHON) VENV=$(NEXT_VENV)

test-next: install-next  ## layouts, moves, checkpoints and noise with the newest megatron-core
	$(NEXT_VENV)/bin/python -m pytest $(NEXT_TESTS:%=tests/test_%.py)

test-slow: install  ## what the default suite leaves out for its length
	$(BIN)/python -m pytest -m slow

# Output is not captured: the events of the jobs are what one wants to see.
test-slurm: install  ## jobs on a Slurm cluster of two nodes, installed (Debian, root) and started here: 3 to 8 minutes
	$(BIN)/python -m pytest -m slurm -s -rs $(SLURM_TESTS)

test-hosts: install  ## jobs on hosts of network namespaces, made here (Debian, root), which are lost and come back
	$(BIN)/python -m pytest -m hosts -rs -s $(HOSTS_TESTS)

lint: install  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: install  ## let ruff mend what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

reference: install  ## write the generated parts of docs/ anew, after a change of a field or an option
	$(BIN)/python docs/hooks/reference.py

figures: install  ## write the figures of kept results into docs/ and README; MEASURE=all DATA=DIR measures them first (hours)
	$(BIN)/python docs/hooks/figures.py $(MEASURE) $(addprefix --data ,$(DATA))

screenshots: install  ## take the pictures of the report and of the commands in docs/ anew, from RUN, with Chromium
	PYTHONPATH=. $(BIN)/python docs/hooks/screenshots.py $(RUN)

docs: $(VENV)/.docs  ## build the documentation into build/site; any warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --no-compile $(addprefix --constraint ,$(CONSTRAINTS)) $(PIP_FLAGS) --editable '.[docs]'
	@touch $@

# Two steps, each with its own limit, so that the whole stays under 8 minutes. The benchmark also runs when a test has
# failed: its numbers help to see why. On a machine without CUDA both say so and succeed.
define GPU_CHECK
@mkdir -p $(OUT)
@tests=0; timeout 240 $(1) -m pytest -m gpu --junitxml=$(OUT)/gpu_tests.xml || tests=$$?; \
timeout 220 $(1) -m benchmarks.gpu_check --json --out $(OUT) && exit $$tests
endef

ifeq ($(WHEELS),)
GPU_PYTHON = $(BIN)/python
GPU_READY = install
else
GPU_PYTHON = env PYTHONPATH=$(abspath $(GPU_SITE)):$(CURDIR) $(PYTHON)
GPU_READY = $(GPU_SITE)
endif

gpu-check: $(GPU_READY)  ## tests and a short benchmark on this machine's GPU, results in OUT (WHEELS=.wheels: without network)
	$(call GPU_CHECK,$(GPU_PYTHON))

# NCCL itself lets ranks share a GPU, so that one GPU is enough to run every collective and every move of four ranks.
gpu-ranks: export NCCL_MULTI_RANK_GPU_ENABLE = 1
gpu-ranks: export LD_PRELOAD = $(NCCL_LIBRARY)
gpu-ranks: $(GPU_READY)  ## the tests and moves of up to 4 ranks on NCCL, which may share one GPU (NCCL 2.31, or NCCL_LIBRARY=FILE)
	@tests=0; $(GPU_PYTHON) -m pytest --nccl -m dist $(RANK_TESTS:%=tests/test_%.py) || tests=$$?; \
	$(GPU_PYTHON) -m benchmarks.reshard --repeats 1 && exit $$tests

$(GPU_SITE): $(wildcard $(WHEELS)/*.whl)
	$(PYTHON) -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target $@ $^
	@touch $@

gpu-wheels: install  ## collect in .wheels what a machine with torch, but without network, lacks (Python 3.12, Linux x86-64)
	rm -rf .wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --constraint constraints.txt --dest .wheels \
		--implementation cp --python-version 3.12 --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
		--platform manylinux2014_x86_64 $(GPU_PACKAGES)
	@du -sh .wheels

clean:  ## remove the environment and everything built; runs and downloaded data stay
	rm -rf $(VENV) $(NEXT_VENV) .wheels build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

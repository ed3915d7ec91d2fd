# `make train` and `make test` are all that a newcomer needs: each sets up .venv if it is missing.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
HANDOVER_VENV ?= .venv-handover
HANDOVER_BIN := $(HANDOVER_VENV)/bin
HANDOVER_READY := $(HANDOVER_VENV)/.ready
RAY_VENV ?= .venv-ray
RAY_BIN := $(RAY_VENV)/bin
RAY_READY := $(RAY_VENV)/.ready
XLA_VENV ?= .venv-xla
XLA_BIN := $(XLA_VENV)/bin
XLA_READY := $(XLA_VENV)/.ready
TORCH ?= torch==2.13.0
# Processes that share the tests, with one thread each.
WORKERS ?= 2
IN_PARALLEL := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help train test test-slow test-families test-all test-ranks fuzz test-hosts test-ray test-xla test-handover package lint test-gpu bench bench-gpu lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

train: $(READY)  ## train the sample model on the sample data (about a minute on two cores)
	$(BIN)/trietune train

test: $(READY) lint  ## style, types, import contract, and the tests that take under 12 minutes
	$(IN_PARALLEL) -m "not slow and not gpu"

test-slow: $(READY)  ## the suites that `make test` leaves out: the fault matrix, real models (half an hour)
	$(IN_PARALLEL) -m "slow and not gpu and not families" --timeout 3000

test-families: $(READY)  ## every causal type of transformers, small and random: on tries, padded, in a plain loop; and runs of it (hours)
	$(BIN)/python tests/causal_types/try_types.py
	$(BIN)/python -m pytest -m families

test-all: test test-slow test-xla  ## every test that this machine can run

fuzz: $(READY)  ## readers of files of others, a minute each (TRIETUNE_FUZZ_SECONDS=600: ten minutes each)
	TRIETUNE_FUZZ_SECONDS=$${TRIETUNE_FUZZ_SECONDS:-60} $(BIN)/python -m pytest tests/fuzz -m slow -s --timeout 7200

test-ranks: $(READY)  ## trainings over several processes: parity, whole runs, lost processes (some minutes)
	$(BIN)/python -m pytest tests/ranks

test-hosts: $(READY)  ## two machines, as network namespaces of this one, and a cable that is cut (Linux, root, iproute2)
	$(BIN)/python -m pytest tests/hosts --timeout 600

test-ray: $(READY) $(RAY_READY)  ## trainings and sweeps on a local Ray cluster (an environment of its own, 0.5 GB)
	TRIETUNE_RAY_PYTHON=$(CURDIR)/$(RAY_BIN)/python $(BIN)/python -m pytest tests/ray_cluster --timeout 900

test-xla: $(XLA_READY)  ## the Tenstorrent and XLA path, on XLA's own CPU client (an environment of its own, 7 GB)
	PJRT_DEVICE=CPU $(XLA_BIN)/python -m pytest tests/xla --timeout 1200

test-handover: $(READY) $(HANDOVER_READY)  ## exports as transformers 4 and llama.cpp read them (an environment of its own, 1 GB)
	TRIETUNE_HANDOVER_PYTHON=$(CURDIR)/$(HANDOVER_BIN)/python $(BIN)/python -m pytest tests/handover

test-gpu: $(READY)  ## tests of a CUDA card (TRIETUNE_STAND_INS=1: on the CPU, to check the tests themselves)
	$(BIN)/python -m pytest tests/gpu --timeout 3000

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(READY)  ## compare with other trainers on this machine; results go to benchmarks/results/
	$(BIN)/python -m pip install --quiet -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/compare.py

bench-gpu: $(READY)  ## on a CUDA card: ways to attend, and training next to other trainers
	$(BIN)/python -m pip install --quiet -r benchmarks/requirements.txt
	$(BIN)/python benchmarks/gpu.py

package:  ## build wheel and sdist into dist/, check them, list what a tested installation consists of
	rm -rf dist
	$(PYTHON) -m build
	$(PYTHON) -m twine check --strict dist/*
	$(PYTHON) -m check_wheel_contents dist/*.whl
	mkdir -p build && $(PYTHON) tools/sbom.py requirements.lock > build/trietune.cdx.json

lock: $(READY)  ## resolve requirements.lock anew
	$(BIN)/python -m pip install --quiet uv
	./requirements.sh $(BIN)

clean:  ## remove the environments and what tools left behind
	rm -rf $(VENV) $(XLA_VENV) $(HANDOVER_VENV) $(RAY_VENV) .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build dist

# A torch that is new enough is kept; with pip, this version is a CPU build where one is offered.
$(READY): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12)' 2>/dev/null \
		|| $(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(XLA_READY): requirements.lock requirements-xla.txt pyproject.toml
	test -x $(XLA_BIN)/python || $(PYTHON) -m venv $(XLA_VENV)
	$(XLA_BIN)/python -m pip install --quiet --no-deps -r requirements-xla.txt
	$(XLA_BIN)/python -m pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(XLA_BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(HANDOVER_READY): requirements-handover.txt
	test -x $(HANDOVER_BIN)/python || $(PYTHON) -m venv $(HANDOVER_VENV)
	$(HANDOVER_BIN)/python -m pip install --quiet '$(TORCH)'
	$(HANDOVER_BIN)/python -m pip install --quiet -r requirements-handover.txt
	touch $@

# A layer over $(VENV): what Ray needs beside it, and nothing twice.
$(RAY_READY): $(READY) requirements-ray.txt
	test -x $(RAY_BIN)/python || $(BIN)/python -m venv $(RAY_VENV)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> $$($(RAY_BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth
	$(RAY_BIN)/python -m pip install --quiet -r requirements-ray.txt
	touch $@

# `make train` and `make test` set up .venv on a fresh machine; a second call installs nothing.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LEROBOT := .venv-lerobot
ARGS ?=
# Processes that share the tests. Each takes about 3 GiB; 0 runs them in pytest's own.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

# The first Python of a supported version that can make virtual environments; `make PYTHON=... test` overrides it.
SUPPORTED := import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for candidate in python3.12 python3.11 python3.10 python3; do \
	$$candidate -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$candidate && break; done)

# egl_probe, which robomimic needs, does not build with CMake 4 otherwise.
export CMAKE_POLICY_VERSION_MINIMUM := 3.5

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow test-all test-lerobot test-libero check format format-check lint types docs stress soak bench-core bench-overlap bench-fast-step bench-policies bench-peers bench-gym bench-libero bench-learning learning-page gpu-check clean distclean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

train: $(STAMP) ## Set up, then fine-tune the shipped Lift policy asynchronously; ARGS="..." adds flags and overrides.
	$(BIN)/asyncflow train --buffer-type vla $(ARGS)

test: $(STAMP) ## Set up, then run the tests in JOBS=2 processes; ARGS="..." goes to pytest.
	$(PYTEST) $(ARGS)

test-slow: $(STAMP) ## Run what `make test` leaves out: the tests that repeat at a larger scale what others show.
	$(PYTEST) -m slow $(ARGS)

test-all: $(STAMP) ## Run both.
	$(PYTEST) -m "" $(ARGS)

test-lerobot: $(LEROBOT)/.installed ## Set up .venv-lerobot, with LeRobot and the torch that it needs, then run its tests there.
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LEROBOT)/bin/python -m pytest tests/lerobot $(ARGS)

test-libero: $(STAMP) ## Install LIBERO's interpreter (`asyncflow envs`) unless there is one, then run its tests.
	$(BIN)/asyncflow envs check libero || $(BIN)/asyncflow envs install libero
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/libero $(ARGS)

check: format-check lint types test ## Everything that a change must pass.

format: $(STAMP) ## Format the code.
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

format-check: $(STAMP) ## Check the format.
	$(BIN)/ruff format --check .

lint: $(STAMP) ## Check the style.
	$(BIN)/ruff check .

types: $(STAMP) ## Check the types.
	$(BIN)/mypy

docs: $(STAMP) ## Write the pages that are made from the code, then build the documentation as a site in build/site.
	$(BIN)/python -c "from asyncflow.metrics.glossary import glossary_markdown as text; print(text(), end='')" > docs/metrics.md
	$(BIN)/python -m tools.rooms
	$(BIN)/python -m tools.handbook.always_holds
	$(BIN)/python -m tools.handbook.picture
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

stress: $(STAMP) ## Inject every kind of fault and write docs/reliability.md; ten minutes. ARGS="--part cuts" runs a part.
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.stress $(ARGS)

soak: $(STAMP) ## Train an hour of toy, then twenty minutes of Lift, and show whether anything grows; needs a quiet machine.
	$(BIN)/python -m tools.soak --task toy --minutes 60 $(ARGS)
	$(BIN)/python -m tools.soak --task lift --minutes 20 $(ARGS)
	$(BIN)/python -m tools.soak --page $(ARGS)

bench-core: $(STAMP) ## Measure workers and ring and write docs/benchmarks/core.md; needs a quiet machine.
	$(BIN)/python -m tools.bench.core $(ARGS)

bench-overlap: $(STAMP) ## Measure what overlap gives and write docs/benchmarks/overlap.md; an hour, needs a quiet machine, can be resumed.
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench.overlap $(ARGS)

bench-fast-step: $(STAMP) ## Compare the faster simulator step with robosuite's and write docs/benchmarks/fast_step.md; two minutes.
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench.core.fast_step $(ARGS)

bench-policies: $(STAMP) ## Measure what policies cost and write docs/benchmarks/policies.md; an hour, needs a quiet machine, can be resumed.
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench.policies $(ARGS)

bench-peers: $(STAMP) ## Compare with other libraries and write docs/benchmarks/peers.md; eight minutes, needs a quiet machine.
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench.peers $(ARGS)

bench-gym: $(STAMP) ## Train beside stable-baselines3 on gymnasium's tasks and write docs/benchmarks/gym.md; an hour, can be resumed.
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench.gym $(ARGS)

bench-libero: $(STAMP) ## Compare env steps per second of LIBERO with its own loop and write docs/benchmarks/libero.md; needs a quiet machine.
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench.libero $(ARGS)

bench-learning: $(STAMP) ## Train and evaluate every condition and seed; hours, needs a quiet machine, can be resumed.
	$(BIN)/python -m tools.bench.learning --out runs/learning $(ARGS)

learning-page: $(STAMP) ## Write docs/benchmarks/learning.md and its picture from the tables of bench-learning.
	$(BIN)/python -m tools.bench.learning.page $(ARGS)

gpu-check: $(STAMP) ## Check both modes on a GPU and write docs/benchmarks/gpu.md; eight minutes, needs no simulator.
	$(BIN)/python -m tools.gpu_check --out docs/benchmarks/gpu.md $(ARGS)

install: $(STAMP) ## Set up .venv.

$(STAMP): pyproject.toml
	@[ -x $(BIN)/python ] || [ -n "$(PYTHON)" ] || \
		{ echo "asyncflow needs Python 3.10 to 3.12 with the venv module; found none"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || \
		{ echo "asyncflow needs Python 3.10 to 3.12 with the venv module; $(PYTHON) is not one"; exit 1; }
	@command -v cc >/dev/null || command -v gcc >/dev/null || { echo "asyncflow needs a C compiler; found no cc"; exit 1; }
	@command -v cmake >/dev/null || { echo "asyncflow needs CMake to build egl_probe; found no cmake"; exit 1; }
	@python=$$([ -x $(BIN)/python ] && echo $(BIN)/python || echo $(PYTHON)); \
		[ -f "$$($$python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || \
		{ echo "asyncflow needs Python's headers to build evdev; $$python has no Python.h (python3-dev)"; exit 1; }
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev,docs,robosuite]'
	@touch $@

# A second environment: LeRobot 0.3 holds torch below 2.8.
$(LEROBOT)/.installed: pyproject.toml
	@[ -x $(LEROBOT)/bin/python ] || $(PYTHON) -c '$(SUPPORTED)' 2>/dev/null || \
		{ echo "asyncflow needs Python 3.10 to 3.12 with the venv module; found none"; exit 1; }
	@[ -x $(LEROBOT)/bin/python ] || $(PYTHON) -m venv $(LEROBOT)
	$(LEROBOT)/bin/python -m pip install --disable-pip-version-check --editable '.[dev,lerobot,robosuite]'
	@touch $@

clean: ## Remove caches and build outputs.
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find asyncflow tests tools -name __pycache__ -prune -exec rm -rf {} +

distclean: clean ## Remove .venv and its like as well.
	rm -rf $(VENV) .venv-peers $(LEROBOT)

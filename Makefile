# Every command of the README. `make help` lists them.
#
#   make pretrain ARGS="trainer.max_steps=50"      overrides for the script, as KEY=VALUE
#   make pretrain EXP_DIR=/data/runs MODEL=base    another place for run folders, another model size
#   make pretrain NAME=trial                       another name for the run folder: EXP_DIR/NAME
#   make report RUNS="runs/one runs/two"           one report of several runs
#   make setup PYTHON=python3.12                   another interpreter for .venv
#   make setup TORCH_INDEX_URL=URL                 torch from another index, for instance CPU builds only
#   make test PYTEST_ARGS="-k packing" JOBS=4      some tests only, in more processes
#   make fuzz N=1000000                            that many inputs; FUZZ_SEED=S for the same ones again
#   make test READY_PYTHON=python3                 an environment that is set up already, as in a container: no .venv

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules

VENV ?= .venv
PYTHON ?=
TORCH_INDEX_URL ?=
CONSTRAINTS ?= constraints.txt
READY_PYTHON ?=
EXP_DIR ?= runs
MODEL ?= tiny
NAME ?= slam_stage1_$(MODEL)
RUNS ?= $(EXP_DIR)/$(NAME)
ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
NODES ?= 2
N ?= 100000

# Tried in this order; the first that is 3.10 or newer and can make virtual environments. 3.11 is what the tests run on.
CANDIDATES := $(if $(PYTHON),$(PYTHON),python3.11 python3.12 python3.13 python3 python3.10)
RUN := $(if $(READY_PYTHON),$(READY_PYTHON),$(VENV)/bin/python)
INSTALL := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check --no-input -c $(CONSTRAINTS)
STAMP := $(VENV)/.nemo_slam

.PHONY: help setup data pretrain demo oracle learning study ablations report docs test cluster-test image-test lint format gpu-check clean distclean faults fuzz soak

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F'|' '{printf "  make %-12s %s\n", $$1, $$2}'

ifdef READY_PYTHON
setup:
	@$(RUN) -c "import nemo_slam, slam_kernels, torch; print('using', '$(READY_PYTHON)', 'with torch', torch.__version__)"
else
setup: $(STAMP)  ## make .venv with torch, NeMo and this project (a few minutes the first time)
endif

# A recipe of its own, so that an interrupted installation keeps what it has.
$(VENV)/bin/python:
	@for python in $(CANDIDATES); do \
	  if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "error: none of these is Python 3.10 or newer with the venv module: $(CANDIDATES)" >&2; \
	  for python in $(CANDIDATES); do \
	    version=$$("$$python" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null) || continue; \
	    if "$$python" -c 'import venv, ensurepip' 2>/dev/null; then echo "  $$python is $$version: too old" >&2; \
	    else echo "  $$python is $$version and has no venv: apt-get install python3-venv" >&2; fi; \
	  done; \
	  echo "Name another one with: make setup PYTHON=/path/to/python3" >&2; \
	  exit 1; \
	fi; \
	echo "setup: $$("$$found" --version) in $(VENV)"; \
	"$$found" -m venv "$(VENV)"

# torch first and alone, so that nothing else chooses its build; the last lines make sure that nothing did.
$(STAMP): pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@started=$$SECONDS; \
	version='import importlib.metadata as m; print(m.version("torch"))'; \
	echo "setup: torch"; \
	$(INSTALL) $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch; \
	before=$$($(VENV)/bin/python -c "$$version"); \
	if [ "$$(uname -s)" = Linux ]; then $(INSTALL) --no-deps triton; fi; \
	echo "setup: torch $$before; now NeMo and nemo_slam"; \
	$(INSTALL) --editable '.[dev]'; \
	after=$$($(VENV)/bin/python -c "$$version"); \
	if [ "$$before" != "$$after" ]; then \
	  echo "error: installing nemo_slam replaced torch $$before by $$after; see $(CONSTRAINTS)" >&2; exit 1; \
	fi; \
	echo "setup: ready after $$((SECONDS - started)) s"; \
	touch $@

data: setup  ## prepare the demonstration corpus: human-read prompts and public-domain text
	@$(RUN) scripts/prepare_data.py prompts

pretrain: setup data  ## stage 1 of the tiny model on the demonstration corpus; again: resume
	@$(RUN) scripts/speech_pretrain.py --config-name slam_stage1 model=$(MODEL) name="$(NAME)" \
	  exp_manager.exp_dir="$(EXP_DIR)" $(ARGS)
	@echo "run folder: $(EXP_DIR)/$(NAME)"
	@$(RUN) scripts/report.py "$(EXP_DIR)/$(NAME)"

demo: setup data  ## the whole path: pre-train, kill and resume, stock NeMo models, transcripts, translations, report
	@$(RUN) scripts/demo.py --exp-dir "$(EXP_DIR)/demo" $(ARGS)

oracle: setup  ## does it learn across modalities? three seeds on an artificial language; again: go on
	@OMP_NUM_THREADS=1 $(RUN) benchmarks/learning.py oracle $(ARGS)

learning: setup data  ## does it learn speech and text? three seeds of stage 1 on human speech; again: go on
	@OMP_NUM_THREADS=1 $(RUN) benchmarks/learning.py stage1 $(ARGS)

study: setup data  ## does pre-training help? several arms and seeds, hours on two cores; again: go on
	@$(RUN) benchmarks/study.py $(ARGS)

ablations: setup data  ## what does each part of pre-training do? ten variants, three seeds; again: go on
	@OMP_NUM_THREADS=1 $(RUN) benchmarks/ablations.py $(ARGS)

report: setup  ## report.html of a run (RUNS="DIR ..." for others): health, curves, examples
	@$(RUN) scripts/report.py $(RUNS)

docs: setup  ## the documentation as a site, in site/
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "documentation: site/index.html"

faults: setup  ## hurt 60 small runs and check that none loses finished work; again: go on
	@OMP_NUM_THREADS=1 $(RUN) benchmarks/faults.py --out "$(EXP_DIR)/faults.jsonl" $(ARGS)

fuzz: setup  ## N damaged inputs for the readers of manifests, text, indexes and configs, from a new seed
	@FUZZ_INPUTS=$(N) FUZZ_SEED=$${FUZZ_SEED:-$$(date +%s)} OMP_NUM_THREADS=1 $(RUN) -m pytest -q tests/fuzz $(PYTEST_ARGS)

soak: setup  ## train a small model for 20 minutes: does it slow down, does it grow?
	@OMP_NUM_THREADS=1 $(RUN) benchmarks/soak.py $(ARGS)

# One thread in each test process: the tests are small, and more processes than cores slow each other down.
test: setup  ## all tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

# Machines are network namespaces of this one. NODES=2,4 for both sizes; each takes some minutes on two cores.
cluster-test: setup  ## several machines, one killed, one slow; needs root and iproute2
	NEMO_SLAM_CLUSTER="$(NODES)" OMP_NUM_THREADS=1 $(RUN) -m pytest tests/cluster -s $(PYTEST_ARGS)

# Without a Docker daemon and without a GPU, on a plain Debian base. Long, and wants much disk.
image-test:  ## build the Dockerfile, then train a step and run the tests inside; needs root, buildah and debootstrap
	docker/test_image.sh

gpu-check: setup  ## everything that wants a GPU, cut after nine minutes; results in benchmarks/results/
	@PYTHONPATH="$(CURDIR):$(CURDIR)/kernels$${PYTHONPATH:+:$$PYTHONPATH}" $(RUN) benchmarks/gpu_check.py $(ARGS)

lint: setup  ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: setup  ## apply ruff's formatting and its safe fixes
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:  ## remove caches and build outputs; data/, runs/ and .venv stay
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find nemo_slam kernels scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean  ## remove .venv too
	rm -rf "$(VENV)"

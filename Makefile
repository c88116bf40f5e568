# Every command of the project. `make` alone lists them. Nothing here needs more than python3 (3.11 or later, with venv),
# make and git; `make test` brings promtool from the distribution when it may.

# Further arguments of every `pip install`, e.g. the index of the CPU builds of torch:
#   make demo PIP_ARGS='--extra-index-url https://download.pytorch.org/whl/cpu'
PIP_ARGS ?=
PYTHON ?= $(firstword $(foreach p,python3.11 python3 python3.12 python3.13,\
	$(shell $(p) -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))
VENV ?= .venv
BIN := $(VENV)/bin
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_ARGS

LOCKED := pyproject.toml constraints.txt wan_grpc/__init__.py

##@ Use
.PHONY: demo
demo: $(VENV)/.server ## Start a server with the embedded model, generate demo.mp4 from it, stop it
	@$(BIN)/python examples/demo.py

##@ Check
.PHONY: test check lint unit distributed functional metrics-lint
test: $(VENV)/.dev promtool lint proto-check unit distributed functional ## Every check that needs no GPU: what CI runs

check: $(VENV)/.dev lint unit ## The quick part, for daily use: lint and unit tests

lint: $(VENV)/.dev ## Formatting, ruff, mypy strict, the floors, buf lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	cd protos && buf lint

.PHONY: proto-check
proto-check: $(VENV)/.dev ## The API breaks nobody, and the committed generated code is what the protos give
	cd protos && buf breaking --against baseline.binpb
	PYTHON=$(PYTHON) protos/generate.sh --check

unit: $(VENV)/.dev ## Tests of one module at a time
	$(BIN)/pytest tests/unit

distributed: $(VENV)/.dev ## Tests of N rank processes against one
	$(BIN)/pytest tests/distributed

functional: $(VENV)/.dev promtool ## Tests of a real server and its real clients
	$(BIN)/pytest tests/functional

.PHONY: fuzz
FUZZ_RUNS ?= 100000
fuzz: $(VENV)/.dev ## Fuzz the reading of input images with FUZZ_RUNS=100000 files; no part of `make test`
	@$(BIN)/pip install -qq --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[fuzz]'
	@directory=$$(mktemp -d); trap 'rm -rf "$$directory"' EXIT; export PYTHONPATH=.; \
	$(BIN)/python tests/fuzz/fuzz_images.py "$$directory" -runs=$(FUZZ_RUNS); \
	$(BIN)/python tests/fuzz/replay_images.py "$$directory"

##@ Change
.PHONY: format proto lock clean
format: $(VENV)/.dev ## Format the code and mend what ruff can mend
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

proto: $(VENV)/.dev ## Generate wan_grpc/v1 from protos/
	PYTHON=$(PYTHON) protos/generate.sh

lock: ## Resolve pyproject.toml afresh into constraints.txt
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/pip install --quiet $(PIP_ARGS) --editable '.[server,dev]'
	sed -i '/^[^#]/d' constraints.txt
	.venv-lock/bin/pip freeze --exclude-editable | sed 's/^\(torch==[0-9.]*\)+.*/\1/' >> constraints.txt
	rm -rf .venv-lock

clean: ## Remove everything that make, the tools and the demo have made
	rm -rf $(VENV) .venv-lock .venv-gen build dist demo.mp4 .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

##@ Underneath
.PHONY: help promtool
help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@ / {printf "%s\n", substr($$0, 5)} \
		/^[a-z-]+:.*## / {printf "  make %-13s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'make: no python3 of version 3.11 or later with venv on PATH (on Debian: apt-get install python3-venv)' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp stands for an install: as long as nothing that it depends on changed, the second run does nothing.
$(VENV)/.server: $(LOCKED) | $(BIN)/python
	@echo "Installing the locked packages of [server] into $(VENV); the first time takes a minute or two"
	@$(BIN)/pip install -qq --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[server]'
	@touch $@

$(VENV)/.dev: $(LOCKED) | $(BIN)/python
	@echo "Installing the locked packages of [server,dev] into $(VENV); the first time takes a minute or two"
	@$(BIN)/pip install -qq --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[server,dev]'
	@touch $(VENV)/.server $@

promtool: ## promtool, which checks the metrics: from PATH, else from the distribution's package `prometheus`
	@command -v promtool >/dev/null || { \
		test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends prometheus >/dev/null; } || { \
		echo 'make: promtool is not on PATH: install the package prometheus (on Debian: sudo apt-get install prometheus)' >&2; exit 1; }

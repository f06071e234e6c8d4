# Everything a user or a maintainer types. `make` alone lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Environments of programs that others wrote, each with its own packages.
CLIENTS ?= $(VENV)/clients
RUN_STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev

.PHONY: help install test-run test test-long test-faults test-slow test-clients test-all check lint types wheel audit bench speedrun docs gpu-check train clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(RUN_STAMP): requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(DEV_STAMP): requirements-dev.txt requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(RUN_STAMP)

install: $(RUN_STAMP) ## make .venv and install what training needs

test-run: $(RUN_STAMP) ## 100 real steps on the embedded corpus into runs/test-run; no network
	@$(BIN)/python run_clm_slimpajama.py --test --output_dir runs/test-run --overwrite_output_dir

test: $(DEV_STAMP) ## the tests, in 6 minutes on 2 cores; no Hub, no GPU
	@$(BIN)/python -m pytest

test-long: $(DEV_STAMP) ## the tests that train for longer, another 7 minutes; CI runs both
	@$(BIN)/python -m pytest -m "long and not slow"

FAULT_TESTS := tests/test_faults.py tests/test_interruptions.py tests/test_limits.py tests/test_every_write.py tests/test_damage.py \
	tests/corpus/test_stream_faults.py tests/corpus/test_odd_files.py tests/hub/test_hub_push.py tests/training/test_several_processes.py \
	tests/anywhere/test_examples.py tests/anywhere/test_exact_stream.py tests/hub/test_strangers.py
test-faults: $(DEV_STAMP) ## the long version of the faults (kills, full disks, broken streams), and their table
	@rm -f $(VENV)/faults.jsonl
	@FAULT_TABLE=$(VENV)/faults.jsonl $(BIN)/python -m pytest -m "" $(FAULT_TESTS)
	@$(BIN)/python -m tests.fault_table $(VENV)/faults.jsonl

test-slow: $(DEV_STAMP) ## the tests of minutes that are no faults
	@$(BIN)/python -m pytest -m slow $(FAULT_TESTS:%=--ignore=%) --ignore=tests/anywhere/test_wheel.py

test-clients: $(DEV_STAMP) ## what a run leaves, in programs of others (transformers 4.57, llama.cpp, DuckDB, ...); minutes, needs the package index
	@$(BIN)/python -m tests.clients $(CLIENTS)

test-all: $(DEV_STAMP) ## every test, the minutes-long ones too
	@$(BIN)/python -m pytest -m ""

lint: $(DEV_STAMP) ## style
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(DEV_STAMP) ## type checker
	@$(BIN)/mypy

wheel: $(DEV_STAMP) ## the wheel, installed outside of the repository, and every example run from it
	@$(BIN)/python -m pytest -m slow -n 0 tests/anywhere/test_wheel.py

audit: $(DEV_STAMP) ## known vulnerabilities of the pinned dependencies, where the package index tells of them
	@$(BIN)/pip-audit --no-deps --disable-pip --progress-spinner off -r requirements.txt

check: lint types test ## lint, types and tests; CI runs this and test-long

# A peer in an environment of its own, over the torch that is here already.
$(VENV)/litgpt/bin/python: | $(DEV_STAMP)
	$(BIN)/python -m venv $(VENV)/litgpt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(echo $(VENV)/litgpt/lib/python3*/site-packages)/torch.pth
	-$(VENV)/litgpt/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		litgpt==0.5.13 lightning==2.6.6 pytorch-lightning==2.6.6 lightning-utilities==0.15.3 torchmetrics==1.9.0 jsonargparse==4.53.0

bench: $(DEV_STAMP) $(VENV)/litgpt/bin/python ## measure the step, what seeing costs, and what grows with a run; results in benchmarks/results/
	@$(BIN)/python benchmarks/steps.py
	@$(BIN)/python benchmarks/steps.py --steps 150 --rounds 1 --history 10000
	@$(BIN)/python benchmarks/steps.py --model small --steps 25 --rounds 2
	@$(BIN)/python benchmarks/growth.py

speedrun: $(DEV_STAMP) ## seconds to a fixed score on the embedded corpus, ten seeds, beside the table so far; half an hour
	@$(BIN)/python benchmarks/speedrun.py

docs: $(DEV_STAMP) ## the documentation as a site in site/; a link that leads nowhere is an error
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

gpu-check: $(DEV_STAMP) ## every claim about CUDA, proved or refuted on one GPU in 8 minutes; result in benchmarks/results/
	@$(BIN)/python benchmarks/gpu_check.py

train: $(RUN_STAMP) ## the 10,000 steps of configs/slimpajama.yaml
	@$(BIN)/accelerate launch run_clm_slimpajama.py --config configs/slimpajama.yaml --resume_from_checkpoint true

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './runs/*' -exec rm -rf {} +

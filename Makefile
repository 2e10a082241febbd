# Every target installs what it needs. `make help` lists them.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
HIVEMIND := $(VENV)/rivals/hivemind

# daemons, workers and test processes start often: let Python keep what it compiled
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test check lint bench bench-setup soak fmt clean
.DEFAULT_GOAL := help

help:  ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

# torch first and by exact version: an unpinned torch pulls the CUDA build
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	# trio-typing (a need of libp2p) brings stubs of an old trio that hide trio's own types
	rm -rf $(VENV)/lib/python3*/site-packages/trio-stubs
	touch $(STAMP)

demo: $(STAMP)  ## Train, lose a peer, checkpoint, export and serve on this machine (DEMO_ARGS="--json --seed 7")
	$(BIN)/fabric demo $(DEMO_ARGS)

lint: $(STAMP)  ## ruff, mypy --strict and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint  ## The loop while you work: lint and the fast tests (under 90 s)
	$(BIN)/pytest -q -m "not slow and not scenario and not gpu" -p no:cacheprovider -n 2

test: $(STAMP)  ## Every test once, scenarios at reduced counts with fixed seeds (under 10 minutes)
	$(BIN)/pytest -q -m "not gpu" -n 4 --dist loadfile --no-loadscope-reorder

soak: $(STAMP)  ## Full counts of one area: make soak AREA=state|net|nat|ckpt|train [SOAK_MINUTES=120]
	$(BIN)/python -m tests.soak $(AREA) --minutes $(or $(SOAK_MINUTES),120)

bench-setup: $(STAMP)  ## Install the rivals that benchmarks compare with
	$(BIN)/pip install -q -c constraints.txt lattica==1.0.21 loro==1.17.1
	# hivemind pins another protobuf: an environment of its own, which sees our torch
	test -x $(HIVEMIND)/bin/python || $(PYTHON) -m venv $(HIVEMIND)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$($(HIVEMIND)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ours.pth
	$(HIVEMIND)/bin/pip install -q hivemind==1.1.12

bench: bench-setup  ## All benchmarks, appended to benchmarks/results/*.jsonl
	$(BIN)/python -m benchmarks.rpc --json
	$(BIN)/python -m benchmarks.bulk --json
	$(BIN)/python -m benchmarks.nat --json
	$(BIN)/python -m benchmarks.store --json
	$(BIN)/python -m benchmarks.simulator --json
	$(BIN)/python -m benchmarks.checkpoints --json
	$(BIN)/python -m benchmarks.collectives --json

fmt: $(STAMP)  ## Format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## Remove the environment and everything generated
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis demo-out

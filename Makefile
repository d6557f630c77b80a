# Every target makes its own environment in .venv. Another Python: make PYTHON=/path/to/python3 ...
PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: help demo test check soak gpu bench tables format clean core dev

help: ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

demo: core ## train, compare and generate: under five minutes on two cores
	@$(RUN) -m examples.demo

test: dev ## the tests, on the CPU
	@$(RUN) -m pytest -n auto -m "not gpu and not soak"

check: dev ## style, types, import order
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m pyright
	@.venv/bin/lint-imports

soak: dev ## long and random tests
	@$(RUN) -m pytest -m soak

gpu: dev ## the tests that want a GPU, and a dated row of what they found
	@$(RUN) -m benchmarks.gpu_tests

bench: core ## the CPU benchmarks, then README's tables
	@$(RUN) -m benchmarks.taylor_cpu
	@$(RUN) -m benchmarks.decoding
	@$(RUN) -m benchmarks.tables

tables: core ## README's tables from benchmarks/results
	@$(RUN) -m benchmarks.tables

format: dev ## bring the source into shape
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

clean: ## remove the environment and what the demo wrote
	rm -rf .venv demo-output

core:
	@$(PYTHON) tools/bootstrap.py core

dev:
	@$(PYTHON) tools/bootstrap.py dev

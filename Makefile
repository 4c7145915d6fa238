# Two commands do everything: `make bench` (the main job) and `make test`. Both set up .venv first, once.
.DEFAULT_GOAL := help
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/.ready

# A folder of real data and models. Without it, the tests that want one skip and say so.
ifneq ($(wildcard ../shared/data/vqa-rad),)
export FASTLN_DATA ?= ../shared
endif

.PHONY: help setup test test-all test-newest lint format bench bench-cpu docs readme-tables compile-report sanitize clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(READY)  ## install everything into .venv, from the pinned versions

$(READY): pyproject.toml constraints.txt
	test -x .venv/bin/pip || $(PYTHON) -m venv --clear .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

bench: $(READY)  ## compare the methods on embedded data and models: runs/quick
	.venv/bin/fastln bench --suite quick --out runs/quick --overwrite

bench-cpu: $(READY)  ## fastln beside peft on models of usual sizes: runs/cpu (takes long)
	.venv/bin/fastln bench --suite cpu --out runs/cpu --overwrite

test: lint  ## lint, then the tests that run in CI, a sample of the exhaustive sweeps among them
	$(PY) -m pytest -n 2 --dist worksteal -q --slow sample

test-all: lint  ## lint, then every test, the exhaustive sweeps included
	$(PY) -m pytest -n 2 --dist worksteal -q --slow all

# pyproject.toml's bounds exclude these versions; pip says so, and installs them all the same. NEWEST takes pip's
# arguments, for a nightly build of torch, say.
NEWEST ?= torch transformers
test-newest:  ## the tests with the newest torch and transformers, in .venv-newest
	test -x .venv-newest/bin/pip || $(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/pip install --quiet --disable-pip-version-check -e '.[dev]'
	.venv-newest/bin/pip install --quiet --disable-pip-version-check --upgrade $(NEWEST)
	FASTLN_UNTESTED_VERSIONS=1 .venv-newest/bin/python -m pytest -n 2 --dist worksteal -q --slow sample

lint: $(READY)  ## ruff (lint and format) and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: $(READY)  ## let ruff rewrite what it can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: .venv/.docs  ## build the documentation into site/, with every link checked
	.venv/bin/mkdocs build --strict --quiet

.venv/.docs: $(READY)
	.venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

readme-tables: $(READY)  ## regenerate the tables of README and docs/ from benchmarks/results/
	$(PY) scripts/tables.py

compile-report: $(READY)  ## compile every kernel for real GPUs and compare with the committed figures
	$(PY) scripts/compile_report.py

sanitize: .venv-sanitize/.ready  ## check every load and store of the kernels against its tensor's bounds, with triton-viz
	.venv-sanitize/bin/python scripts/sanitize.py

# This triton-viz needs Triton 3.6. torch for CUDA pins another, so Triton is installed last, without dependencies.
.venv-sanitize/.ready: constraints.txt scripts/sanitize-requirements.txt
	test -x .venv-sanitize/bin/pip || $(PYTHON) -m venv --clear .venv-sanitize
	.venv-sanitize/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r scripts/sanitize-requirements.txt
	.venv-sanitize/bin/pip install --quiet --disable-pip-version-check --no-deps triton==3.6.0
	touch $@

clean:  ## remove what setup, runs and docs created
	rm -rf .venv .venv-newest .venv-sanitize runs site

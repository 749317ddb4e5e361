# pfntrace: `make help` lists the targets. Everything runs from a fresh clone.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# The Python that makes .venv; 3.11 or newer.
PYTHON ?= python3
# 1: `make demo` records on this host instead of in the lab.
HOST ?= 0
# How often `make soak` simulates each kernel and bug, for how many minutes at most; `make test`.
SEEDS ?= 1000
MINUTES ?= 600
TEST_SEEDS ?= 20
# Length of the trace that `make bench` makes for check, report and the like.
RECORDS ?= 5000000

LAB := tests/lab/lab
BIN := .venv/bin
DEMO := build/demo
C_FILES = $(shell find probes/bpf -name '*.[ch]')
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

comma := ,
say = echo "== $(1)"
# $(1) packages. The lists may be old, or a fresh machine may have none.
apt_install = { $(call say,apt: installing $(1)); \
	command -v apt-get >/dev/null || { echo "no apt-get here: install what Debian calls $(1)" >&2; exit 1; }; \
	$(SUDO) apt-get update -qq && \
	$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(1) >/dev/null; }

.PHONY: help install check test demo lab lab-bugs bench soak facts tables format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: .venv/.installed ## make .venv with everything that Python needs (.venv/bin/pfntrace)
	@$(call say,installed: $(BIN)/pfntrace)

.venv/.installed: pyproject.toml setup.py $(wildcard tracer/simulator/*.py)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "pfntrace needs Python 3.11 or newer: make install PYTHON=..." >&2; exit 1; }
	@# Debian's python3 has no venv of its own: python3-venv brings ensurepip.
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(call apt_install,python3-venv)
	@$(call say,venv: Python packages into .venv$(comma) the simulator compiled (two minutes))
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	@rm -f *.so tracer/simulator/*.so
	@$(BIN)/pip install --disable-pip-version-check --editable '.[dev]' 2>&1 | \
		sed -un -e 's/^Collecting \([^ ]*\).*/   \1/p' -e '/^ *ERROR/,$$p'
	@compgen -G 'tracer/simulator/*.so' >/dev/null || $(call say,the simulator is not compiled and \
		three times slower: apt install gcc libc6-dev python3-dev$(comma) then make -B install)
	@touch $@

check: .venv/.installed ## format, lint, types, layers, unit tests; needs no lab (2 minutes)
	@mkdir -p build
	@$(call say,format: ruff)
	@$(BIN)/ruff format --check . >build/format.log || \
		{ cat build/format.log; echo "run: make format" >&2; exit 1; }
	@$(call say,format: clang-format)
	@$(BIN)/clang-format --dry-run --Werror $(C_FILES) || { echo "run: make format" >&2; exit 1; }
	@$(call say,lint: ruff)
	@$(BIN)/ruff check --quiet .
	@$(call say,types: mypy)
	@$(BIN)/mypy --no-error-summary
	@$(call say,layers: import-linter)
	@$(BIN)/lint-imports --no-cache >build/layers.log || { cat build/layers.log; exit 1; }
	@$(call say,unit tests: pytest)
	@$(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'not lab' tests

test: .venv/.installed ## check, simulations, then every lab test on all three kernels (builds the lab)
	@command -v cc >/dev/null || $(call apt_install,gcc libc6-dev)
	@$(PYTHON) -c 'import os, sysconfig as s; os.stat(s.get_path("include") + "/Python.h")' \
		2>/dev/null || $(call apt_install,python3-dev)
	@compgen -G 'tracer/simulator/*.so' >/dev/null || rm -f .venv/.installed
	@# Fast lifetimes against slow ones: 500 random traces for each of 15 tests, the same each time.
	@PFNTRACE_EXAMPLES=500 PFNTRACE_REQUIRE=cc $(MAKE) check
	@$(call say,simulations: $(TEST_SEEDS) seeds of each kernel and bug (3 minutes))
	@$(BIN)/python tests/unit/simsoak.py $(TEST_SEEDS)
	@$(call say,simulations: stories that nobody thought of)
	@PFNTRACE_EXAMPLES=150 $(BIN)/python -m pytest -q -n 2 \
		tests/unit/test_sim_machine.py tests/unit/test_sim_stories.py
	@$(MAKE) lab
	@$(call say,lab tests: pytest (each boots a kernel))
	@PFNTRACE_REQUIRE=lab,cc $(BIN)/python -m pytest -v --capture=no -m lab --durations=10 \
		$(wildcard tests/live) tests/lab

lab: ## build the lab: root file system, three kernels, workloads (cached)
	@$(call say,lab: building what is missing)
	@$(LAB) build

demo: .venv/.installed ## record a KVM guest on Linux 6.12 in the lab and report it (HOST=1: here)
	@mkdir -p $(DEMO)
	@rm -f $(DEMO)/demo.pfnt
ifeq ($(HOST),1)
	@$(BIN)/python -c 'import sys; from tracer.observe import bcc_spec; sys.exit(not bcc_spec())' || \
		$(call apt_install,python3-bpfcc)
	@command -v cc >/dev/null || $(call apt_install,gcc libc6-dev)
	@$(call say,demo: can this host record?)
	@$(SUDO) $(BIN)/pfntrace doctor >$(DEMO)/doctor.txt || { cat $(DEMO)/doctor.txt; exit 1; }
	@$(call say,demo: recording a guest that touches a prime number of pages on this host)
	@cc -O2 -o $(DEMO)/prime-guest tests/lab/workloads/prime_guest.c
	@$(SUDO) $(BIN)/pfntrace record -o $(DEMO)/demo.pfnt -- $(DEMO)/prime-guest
else
	@$(call say,demo: building the smallest part of the lab (some minutes the first time))
	@$(LAB) build --kernel 6.12
	@$(call say,demo: booting Linux 6.12 and recording a guest there)
	@$(LAB) run --kernel 6.12 --out $(DEMO) -- pfntrace record -o /out/demo.pfnt -- prime-guest
endif
	@$(call say,demo: $(BIN)/pfntrace report $(DEMO)/demo.pfnt)
	@$(BIN)/pfntrace report $(DEMO)/demo.pfnt

lab-bugs: .venv/.installed ## changed KVMs with planted bugs, recorded and checked (30 minutes)
	@$(LAB) build
	@$(call say,lab-bugs: one boot per kernel and bug; docs/BUGS.md and docs/SERIES.md are made anew)
	@status=0; \
	$(BIN)/python tests/live/bugs.py --keep build/bugs --write docs/BUGS.md || status=1; \
	$(BIN)/python tests/live/series.py build/bugs docs/SERIES.md || status=1; \
	exit $$status

soak: .venv/.installed ## SEEDS=1000 simulations of every kernel and bug; makes docs/SIMULATION.md
	@$(call say,soak: $(SEEDS) seeds of each kernel and bug)
	@$(BIN)/python tests/unit/simsoak.py $(SEEDS) docs/SIMULATION.md "$(MINUTES)" build/soak

bench: .venv/.installed ## what recording costs: alone, under pfntrace, under trace-cmd
	@$(call say,bench: interleaved runs in one boot of the lab (ratios of medians))
	@$(BIN)/python tests/live/bench.py
	@$(call say,bench: commands that read a whole trace: $(RECORDS) records)
	@$(BIN)/python tests/bench/check.py --records $(RECORDS)
	@$(call say,bench: lifetimes of SPTE records in memory, beside DuckDB)
	@$(BIN)/python tests/bench/lifetimes.py
	@$(call say,bench: records that the simulator makes$(comma) compiled and not)
	@$(BIN)/python tests/bench/simulate.py

facts: .venv/.installed ## capture tests/unit/facts/*.json anew from the lab's kernels
	@$(call say,facts: observing each kernel of the lab)
	@$(BIN)/python tests/unit/facts/capture.py

tables: .venv/.installed ## write docs/TABLES.md anew from analysis/schema.py
	@mkdir -p docs
	@$(BIN)/python -c 'from analysis.schema import reference; print(reference(), end="")' >docs/TABLES.md

format: .venv/.installed ## format Python and C
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --quiet --fix --select I .
	@$(BIN)/clang-format -i $(C_FILES)

clean: ## remove what is built here (.venv, caches); the lab's own cache stays
	rm -rf .venv build *.egg-info *.so tracer/simulator/*.so .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Every target brings its own environment (.venv, .venv-bench), does nothing twice, and never touches the system Python.
# Needs Python 3.11 or newer and make. Another interpreter: make PYTHON=/path/to/python3.13 demo

PYTHON ?= python3
PIP := pip==26.0.1
METHODS := $(patsubst examples/%_reproduce.py,%,$(wildcard examples/*_reproduce.py))
BENCHMARKS := $(wildcard benchmarks/[a-z]*.py)
RUN := .venv/bin/python -m

ifdef METHOD
METHODS := $(METHOD)
BENCHMARKS := benchmarks/$(METHOD).py
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:  # targets share two cores and one docs build; the tests' summary must stay the last lines
.PHONY: help demo test test-slow lint types docs bench reproduce clean distclean

help:  ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name what; do \
		printf '  make %-11s %s\n' "$$name" "$$what"; done

demo: .venv/.stamp  ## Train the demo tiles and write runs/demo/index.html (under three minutes on two cores).
	.venv/bin/lightning-ext demo

test: lint types docs  ## Run everything: lint, types, docs, then the tests with doctests, recipes, examples and snippets.
	$(RUN) pytest -m "not slow"

test-slow: .venv/.stamp  ## Run the tests that take minutes (marked slow).
	$(RUN) pytest -m slow --timeout 1800

lint: .venv/.stamp  ## Check style, formatting, spelling and the import rules.
	$(RUN) ruff check
	$(RUN) ruff format --check
	.venv/bin/codespell
	.venv/bin/lint-imports

types: .venv/.stamp  ## Check types (mypy, strict on the package).
	$(RUN) mypy

docs: .venv/.stamp  ## Build the documentation into docs/_build/html; a warning is an error.
	$(RUN) sphinx -E -W --keep-going -j auto -q docs docs/_build/html
	@echo "Documentation: docs/_build/html/index.html"

bench: .venv-bench/.stamp  ## Time us against peers and write benchmarks/results/*.json (one method: METHOD=mrvae).
	@set -e; for script in $(BENCHMARKS); do echo "$$script"; .venv-bench/bin/python "$$script"; done

reproduce: .venv/.stamp  ## Check the papers' claims and write runs/reproduce/*.json (METHOD=mrvae; FULL=1 needs a GPU).
	@set -e; for method in $(METHODS); do \
		.venv/bin/lightning-ext reproduce "$$method" $(if $(FULL),--full); done

clean:  ## Remove what builds, tests and runs have written; environments and benchmark results stay.
	rm -rf build dist runs lightning_logs docs/_build docs/api docs/gallery docs/methods \
		.mypy_cache .ruff_cache .pytest_cache .import_linter_cache

distclean: clean  ## Remove the environments too; the next target installs them again.
	rm -rf .venv .venv-bench

.venv/.stamp: pyproject.toml constraints.txt
	$(call install,.venv,-c constraints.txt --group dev)

.venv-bench/.stamp: pyproject.toml constraints.txt constraints-bench.txt requirements/bench-no-deps.txt
	$(call install,.venv-bench,-c constraints-bench.txt --group bench,requirements/bench-no-deps.txt)

# $(call install,environment,pip arguments,packages to install without what they require): make or renew an
# environment, and stamp it once it is whole.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo \
	"lightning_ext needs Python 3.11 or newer; '$(PYTHON)' is `$(PYTHON) --version 2>&1`. Try: make PYTHON=python3.11"; exit 1; }
@echo "Setting up $(1) (once; a few minutes)"
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
@$(1)/bin/python -m pip install --quiet $(PIP)
$(1)/bin/python -m pip install $(2) -e '.[all]'
$(if $(3),$(1)/bin/python -m pip install --no-deps -r $(3))
@touch $@
endef

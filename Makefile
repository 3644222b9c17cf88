# The front door: `make help`. The first call of any target but help and clean sets everything up in .venv.
CONFIG ?=
CKPT   ?=
RUN    ?=
INPUT  ?=
ARGS   ?=
WHEEL  ?=
VENV   ?= .venv
# a value as one word of the shell, whatever is in it; nothing where it is empty
quoted = $(if $(1),'$(subst ','\'',$(1))')
# the default one, which train.py names, where none is given
config = $(if $(CONFIG),--config $(call quoted,$(CONFIG)))
FEDERATED = $(or $(CONFIG),configs/federated/digits.yaml)
RECENT := import sys; sys.exit(sys.version_info < (3, 11))
# the first Python that is recent enough; the newest wheels of torch may be missing for a Python that is younger still
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c '$(RECENT)' 2>/dev/null && echo $$p && break; done)
# where it is there, it installs in place of pip; make setup UV= for pip
UV     ?= $(shell command -v uv)
INSTALL = $(PYTHON) .ci/environment.py $(VENV) '$(UV)'
# the code of this project first: several may share an environment, which has one of them installed
export PYTHONPATH := $(CURDIR)/src$(if $(PYTHONPATH),:$(PYTHONPATH))

# A program that people stop: make leaves by the same signal, as its "Error 130" would tell of a failure. The shell stays a
# moment, as make fails where the child that its handler waits for has gone before.
stoppable = $(info $(1))@trap : HUP INT TERM; $(1); code=$$?; \
	case $$code in 129|130|143) kill -$$((code - 128)) $$PPID; sleep 0.3; exit 0;; esac; exit $$code

.DEFAULT_GOAL := help
.PHONY: help setup extras extras-federated train federate resume eval predict export report ls sweep test format lint tensorboard prove upgrade clean

help:
	@awk -F ':[^#]*## ' '/^##@ / {print "\n" substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-11s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n%s\n' 'CKPT is a checkpoint or a run directory; without it, and without RUN, the newest run counts.'
	@echo 'ARGS stands for all other words of the command: ARGS="--model.lr 0.01"'

##@ Train
train: setup ## start a run and test it: CONFIG=configs/x.yaml, ARGS
	$(call stoppable,$(VENV)/bin/python train.py $(config) $(ARGS))

resume: setup ## go on with a run: CKPT, ARGS
	$(call stoppable,$(VENV)/bin/python resume.py $(call quoted,$(CKPT)) $(ARGS))

federate: federated-config extras-federated ## many clients, with Flower: CONFIG=configs/federated/x.yaml
	$(call stoppable,$(VENV)/bin/python train.py --config $(call quoted,$(FEDERATED)) $(ARGS))

federated-config: # before anything is installed for it; no target of its own
	@test -f $(call quoted,$(FEDERATED)) || { printf 'No such config file: %s. %s\n' $(call quoted,$(FEDERATED)) \
	  'A copy of the template has no config with many clients. Name yours: make federate CONFIG=...' >&2; exit 2; }

sweep: setup ## try values: CONFIG=configs/sweep/lr.yaml, or ARGS
	$(call stoppable,$(VENV)/bin/python -m savepoint sweep $(call quoted,$(CONFIG)) $(ARGS))

prove: setup ## a straight run against a killed and resumed one: CONFIG
	$(call stoppable,$(VENV)/bin/python -m savepoint.prove $(config) $(ARGS))

##@ Look at runs
ls: setup ## a table of all runs, or of the checkpoints of one: RUN
	$(VENV)/bin/python -m savepoint ls $(call quoted,$(RUN)) $(ARGS)

report: setup ## one HTML file that shows a run: RUN, ARGS="-o FILE"
	$(VENV)/bin/python -m savepoint report $(call quoted,$(RUN)) $(ARGS)

tensorboard: setup ## the curves of all runs in outputs/
	$(call stoppable,$(VENV)/bin/tensorboard --logdir outputs $(ARGS))

##@ Use a model
eval: setup ## test a checkpoint, of a run the best: CKPT, ARGS
	$(call stoppable,$(VENV)/bin/python -m savepoint eval $(call quoted,$(CKPT)) $(ARGS))

predict: setup ## name the class of images: CKPT, INPUT=image, folder or .npy
	@test -f src/project/predict.py || { echo 'No src/project/predict.py. It belongs to the example: write one that reads your input.' >&2; exit 2; }
	$(VENV)/bin/python -m project.predict $(call quoted,$(CKPT)) $(call quoted,$(INPUT)) $(ARGS)

export: setup ## the model in another format: CKPT, ARGS="--format onnx"
	$(VENV)/bin/python -m savepoint export $(call quoted,$(CKPT)) $(ARGS)

##@ Develop
setup: ## the environment in .venv, once; the others call it
	@$(or $(PYTHON),false) -c '$(RECENT)' || { echo "No Python that is recent enough: $$($(or $(PYTHON),python3) --version 2>&1). Expected 3.11 or newer. Name one: make setup PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(INSTALL)

extras: setup ## what is optional: Optuna, ONNX, wandb, MLflow, S3, Keras
	$(INSTALL) 'savepoint-lightning[sweep,onnx,wandb,mlflow,remote,keras,flax,notebook]'

extras-federated: setup ## Flower, Ray; protobuf, rich, packaging go down
	@$(VENV)/bin/python -c 'import flwr, ray' 2>/dev/null || { echo 'Flower lowers protobuf to 6, rich to 14 and packaging to 25: all within our ranges.'; \
	  $(INSTALL) 'savepoint-lightning[federated-ray]'; }

test: setup ## the tests; ARGS="-k name", ARGS="-n 0 -m slow -s"
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

format: setup ## what ruff can mend by itself
	$(VENV)/bin/python -m ruff check --fix-only . && $(VENV)/bin/python -m ruff format --config 'format.exclude=[]' .

lint: setup ## ruff and mypy
	$(VENV)/bin/python -m ruff check .
	@$(VENV)/bin/python -m ruff format --check . || { echo 'Layout only: make format mends it.' >&2; exit 1; }
	$(VENV)/bin/python -m mypy

upgrade: setup ## in a copy: another version of the library, WHEEL=FILE
	$(VENV)/bin/python -m savepoint.template upgrade -- $(or $(call quoted,$(WHEEL)),'')
	@$(MAKE) --no-print-directory setup
	$(INSTALL) --no-deps --force-reinstall vendor/*.whl

-include benchmarks/bench.mk  # of the template alone

clean: ## remove caches; .venv and the runs in outputs/ stay
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage* htmlcov build src/savepoint/build src/*.egg-info src/savepoint/*.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

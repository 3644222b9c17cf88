# Targets of the template alone: a copy has no benchmarks/, and is no template.
NAME    ?=
DEST    ?=
LIBRARY ?= wheel
.PHONY: bench drill new

##@ Of the template
new: setup ## your own project: NAME=cats DEST=../cats, LIBRARY=source
	@$(VENV)/bin/python -m savepoint.template new --library $(call quoted,$(LIBRARY)) $(ARGS) -- $(or $(call quoted,$(NAME)),'') $(or $(call quoted,$(DEST)),'')

drill: setup ## kills, rot, a full disk, beside Lightning's ModelCheckpoint
	$(call stoppable,PYTHONPATH=benchmarks:$$PYTHONPATH $(VENV)/bin/python -m faults.drill $(ARGS))

bench: setup ## speed against what people use today; FULL=1 for all of it
	$(call stoppable,$(VENV)/bin/python benchmarks/bench.py $(ARGS))

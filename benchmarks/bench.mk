# Targets of the template alone: a copy has no benchmarks/, and is no template.
NAME    ?=
DEST    ?=
LIBRARY ?= wheel
.PHONY: bench drill new

new: setup ## the start of your own project, a copy of this: NAME=cats DEST=../cats, LIBRARY=source to change the library
	@$(VENV)/bin/python -m savepoint.template new --library $(call quoted,$(LIBRARY)) $(ARGS) -- $(or $(call quoted,$(NAME)),'') $(or $(call quoted,$(DEST)),'')

drill: setup ## kills, rot, a full disk, signals: this and Lightning's ModelCheckpoint side by side
	PYTHONPATH=benchmarks:$$PYTHONPATH $(VENV)/bin/python -m faults.drill $(ARGS)

bench: setup ## speed against what people use today, one table; FULL=1 adds what is slow; needs DATA_ROOT
	$(VENV)/bin/python benchmarks/bench.py $(ARGS)

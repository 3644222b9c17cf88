.PHONY: bench

bench: setup ## speed against what people use today, one table; FULL=1 adds what is slow; needs DATA_ROOT
	$(VENV)/bin/python benchmarks/bench.py $(ARGS)

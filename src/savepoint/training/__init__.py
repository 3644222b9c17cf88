"""A training that is wired to a run directory: built, executed, logged, summed up."""

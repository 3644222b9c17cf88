"""The machinery of a run that survives: how runs are started, saved and resumed. It knows nothing of `project`."""

__version__ = "0.1.0"

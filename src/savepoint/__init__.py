"""The machinery of a run that survives: how runs are started, saved and resumed. It knows nothing of `project`."""

import time

__version__ = "0.1.0"

STARTED = time.monotonic()  # the entry points import this first: what `wall_secs` counts from

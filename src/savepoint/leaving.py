"""How a process of ours ends: at once, after all that Python promises at an exit. Standard library
only.

Python itself would free the million objects of the libraries one by one first, which takes seconds.
By then threads were waited for, handlers of atexit called, and what a training left behind was
freed, its `__del__` called; a file that is open is flushed. Only objects that modules still hold
are not finalized, of which Python gives no guarantee either.
"""

import atexit
import contextlib
import gc
import io
import os

# The first handler is called last. What stands before it, a profiler's or coverage's, would be left
# out: then Python ends the process.
_IS_FIRST = not atexit._ncallbacks()
_code: int | None = None


def with_code(code: int) -> None:
    """This process ends with `code`; it is about to be left."""
    global _code
    if _IS_FIRST:
        _code = code


def thaw() -> None:
    """Objects that were frozen would be reported as leaked, by Triton's bindings, where Python
    itself ends the process.
    """
    if _code is None:
        gc.unfreeze()


def _leave() -> None:
    if _code is None:
        return
    gc.collect()  # a Trainer and its callbacks are a cycle; what was frozen is not looked at
    gc.unfreeze()
    objects = gc.get_objects()
    # What writes into another file comes before that one.
    for kind in (io.TextIOBase, io.BufferedIOBase, (io.BufferedWriter, io.BufferedRandom)):
        for one in objects:
            if issubclass(type(one), kind):
                with contextlib.suppress(Exception):  # closed, or nobody reads it
                    one.flush()
    os._exit(_code)


if _IS_FIRST:
    atexit.register(_leave)

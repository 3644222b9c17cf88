"""How a process of ours ends: at once, after all that Python promises at an exit. Standard library
only.

Python itself would free the million objects of the libraries one by one first, which takes seconds.
By then threads were waited for, handlers of atexit called, what a training left behind was freed,
its `__del__` called, and each file that is open is closed. Only objects that modules still hold are
not finalized, of which Python gives no guarantee either.
"""

import atexit
import contextlib
import gc
import io
import os
import sys
from types import FrameType
from typing import Any

# The first handler is called last. What stands before it, a profiler's or coverage's, would be left
# out: then Python ends the process.
_IS_FIRST = not atexit._ncallbacks()
# They finish in C, at the end of Python: open HDF5 files, MPI_Finalize.
_FINISHED_BY_PYTHON = {"h5py", "mpi4py", "netCDF4"}
_FILE = io.IOBase.__mro__[1]  # to ask the abstract class about a million objects takes a second
_code: int | None = None


def with_code(code: int) -> None:
    """This process ends with `code`. Called by the function that a script ends with."""
    global _code
    if _IS_FIRST and not sys.flags.inspect and _is_script(sys._getframe(2)):
        _code = code


def _is_script(frame: FrameType | None) -> bool:
    """Whether nothing goes on after what `frame` runs: no program that has called it, no debugger,
    whose exit code is its own.
    """
    names = []
    while frame is not None:
        names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names in (["<module>"], ["<module>", "_run_code", "_run_module_as_main"])


def _leave() -> None:
    # A thread that is in the middle of a write holds its file, and may never let go.
    other_threads = len(sys._current_frames()) - 1
    if _code is None or other_threads or _FINISHED_BY_PYTHON & sys.modules.keys():
        gc.unfreeze()  # Triton's bindings would report what stays frozen as leaked
        return
    gc.collect()  # a Trainer and its callbacks are a cycle; what was frozen is not looked at
    gc.unfreeze()
    files = [one for one in gc.get_objects() if issubclass(type(one), _FILE)]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # none, or closed; below, a full disk
            stream.flush()
    for file in sorted(files, key=_layer):
        with contextlib.suppress(Exception):
            file.close()
    os._exit(_code)


def _layer(file: Any) -> int:
    """What writes into another file comes before that one: texts, archives, buffers, files."""
    if isinstance(file, io.TextIOBase):
        return 0
    if isinstance(file, io.BufferedWriter | io.BufferedRandom):
        return 2
    return 3 if isinstance(file, io.RawIOBase) else 1


atexit.register(_leave)

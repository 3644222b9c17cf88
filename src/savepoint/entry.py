"""From `python train.py` to an exit code: the one place where errors become messages. Standard
library only.

0          done
1          a failure: a traceback, or an error that says the run could not be saved
2          what the user can mend: one to five lines, no traceback
128 + n    stopped by signal n, after a save
"""

import contextlib
import errno
import gc
import hashlib
import importlib.util
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from savepoint import leaving, preemption
from savepoint.errors import ConfigError, SavepointError
from savepoint.job import launched, rank
from savepoint.words import printable
from savepoint.workspace import Project, enter

_STARTED_AS_RANK = launched()
_WAIT_SECS = 3.0
_FRESH_SECS = 60.0


def run(main: Callable[[Sequence[str]], int], script: str, default_config: str = "") -> None:
    """Calls `main` with the arguments of this process and ends the process with its result.

    Args:
        script: The file that was started; its folder is the project.
        default_config: The config of a run whose arguments name none, relative to the project.
    """
    project = Project(Path(script).resolve().parent, Path(default_config))
    sys.stdout = tolerant(sys.stdout)
    sys.stderr = tolerant(sys.stderr)
    try:
        take_own_code(project.root)
        enter(project)
        preemption.install()
        warn_of_shared_store()
        sys.unraisablehook = preemption.sent_again(sys.unraisablehook)
        code = main(sys.argv[1:])
    except preemption.Preempted as preempted:
        # 0 on the other ranks: the launcher would take a rank that ends with an error for crashed,
        # and kill rank 0 while it saves.
        code = 0 if rank() else int(preempted.code or 0)
        if code:
            print(f"Stopped by {preempted.name}.", file=sys.stderr)
    except SavepointError as error:
        if not is_printed_elsewhere(str(error)):
            print(printable(str(error)), file=sys.stderr)
        code = error.exit_code
    except RuntimeError as error:
        if not is_peer_gone(error):
            raise
        print(
            f"Another rank is gone (its own output says why): rank {rank()} cannot go on alone.",
            file=sys.stderr,
        )
        code = 1
    leaving.with_code(code)
    sys.exit(code)


def warn_of_shared_store() -> None:
    """Once, under a torchrun that may start its workers again: by chance those read the addresses
    of the dead ones.
    """
    known = os.environ
    if (
        rank()
        or known.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        or known.get("TORCHELASTIC_RESTART_COUNT") != "0"
    ):
        return
    if known.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        print(
            "A restart by this torchrun may fail: its store, which all starts share, still names "
            "the dead ranks. Start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its "
            "environment.",
            file=sys.stderr,
        )


def is_printed_elsewhere(message: str) -> bool:
    """Whether another rank on this host prints this very message: rank 0 prints what all ranks
    refuse, every other rank what it alone has met.
    """
    # Rank 0 may have started the others itself.
    launcher = os.getpid() if launched() and not _STARTED_AS_RANK else os.getppid()
    text = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {message}"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    mark = Path(tempfile.gettempdir(), f"savepoint-said-{os.getuid()}-{launcher}-{digest}")
    if rank() == 0:
        if launched():
            _sweep(mark)
            _leave(mark)
        return False
    until = time.monotonic() + _WAIT_SECS
    while time.monotonic() < until:
        if _is_fresh(mark):
            return True
        time.sleep(0.05)
    # Rank 0 is on another host, or has not met the error: the first of the others prints it.
    return not _leave(mark)


def _sweep(mark: Path) -> None:
    """Deletes the marks of this user's earlier starts, under any launcher."""
    for old in mark.parent.glob(f"savepoint-said-{os.getuid()}-*"):
        if old == mark or not _is_fresh(old):
            with contextlib.suppress(OSError):
                old.unlink()


def _leave(mark: Path) -> bool:
    try:
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return not _is_fresh(mark)
    except OSError:  # nowhere to leave it: a message twice is better than none
        return True
    return True


def _is_fresh(mark: Path) -> bool:
    """Whether a mark is of this start: an older launcher of the same number had other ranks."""
    try:
        return time.time() - mark.lstat().st_mtime < _FRESH_SECS
    except OSError:
        return False


def is_peer_gone(error: RuntimeError) -> bool:
    """Whether a collective of gloo or NCCL failed because the process at the other end has died."""
    message = str(error)
    closed = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Socket closed",
        "Broken pipe",
    )
    is_collective = "gloo/" in message or "NCCL" in message
    return is_collective and any(words in message for words in closed)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the slow imports: says so on a terminal meanwhile, and collects no garbage. They make
    a million objects that stay; collections over them would cost a sixth of the start, and time at
    every later collection.
    """
    is_inside_another = not gc.isenabled()
    if "torch" in sys.modules or is_inside_another:
        yield
        return
    gc.disable()
    try:
        with saying("Loading PyTorch ..."):
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def saying(text: str) -> Iterator[None]:
    """On a terminal a line that is gone afterwards."""
    is_terminal = sys.stderr is not None and sys.stderr.isatty() and not rank()
    if not is_terminal or os.environ.get("TERM") == "dumb":
        yield
        return
    print(text, end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class _Output(io.FileIO):
    """Standard output or error. A training goes on where its reader is gone (`| head`, a closed
    terminal) or its disk is full.
    """

    lost: OSError | None = None  # the first failed write

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
        except OSError as error:
            written = None
            self.lost = self.lost or error
        return len(data) if written is None else written


def tolerant(stream: TextIO) -> TextIO:
    """A stream that drops what nobody can read any more."""
    if not isinstance(stream, io.TextIOWrapper):  # none at all, or somebody else's
        return stream
    stream.flush()
    output = io.BufferedWriter(_Output(stream.fileno(), "w", closefd=False))
    return io.TextIOWrapper(
        output,
        stream.encoding,
        stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def require_whole_output() -> None:
    """Called at the end of a command whose output is its result. A reader that left early is no
    error.

    Raises:
        ConfigError: the disk under the output is full.
    """
    sys.stdout.flush()
    lost = getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "lost", None)
    if lost is not None and lost.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise ConfigError(
            f"The output could not be written: {lost.strerror}. The output of a command is its "
            "result. Make room, and call again."
        )


def take_own_code(root: Path) -> None:
    """Has the project under `root` import its own code in an environment that several share, where
    the code of one of them is installed.

    Raises:
        ConfigError: that of another project is loaded already, or nothing else is there.
    """
    own = (root / "src").resolve()
    if (own / "project").is_dir() and _found("project") != own / "project":
        sys.path.insert(0, str(own))
        importlib.invalidate_caches()
    for package in ("project", "savepoint"):
        found = _found(package)
        if package == "savepoint" and not (own / package).is_dir():
            continue  # installed, as in a copy that has it as a wheel
        if found is not None and found != own / package:
            raise ConfigError(
                f"This environment runs another copy's code: {found}. Expected it under {root}, "
                "as that project was called. Call it by make, or with PYTHONPATH=src, or set up an "
                f"environment of its own: cd {root} && make setup"
            )


def _found(package: str) -> Path | None:
    """The folder of a package that is loaded, or that an import would load."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).resolve().parent if spec and spec.origin else None

"""From a program's arguments to its exit code, in a process of its own."""

import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.limits import HANG_SECS

from savepoint import entry

ROOT = Path(__file__).resolve().parents[1]
HEAD = """
import signal, sys, time, weakref
from pathlib import Path
from savepoint import entry, errors

def main(argv):
    for line in range(3000):
        print("out", line, flush=True)
        print("err", line, file=sys.stderr)
    Path(argv[0]).touch()
    return 0

def fail(argv):
    raise errors.CheckpointSaveError("Saving failed.", "x")

def dropped(argv):
    class Thing: ...
    thing = Thing()
    seen = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGTERM))
    del thing
    time.sleep(30)

def mistake(argv):
    raise errors.ConfigError("Wrong.")
"""


def command(body: str, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-c",
        f"{HEAD}\nentry.run({body}, {str(ROOT / 'train.py')!r})",
        *arguments,
    ]


@pytest.mark.parametrize("code", ["{} > /dev/full 2>&1", "{} 2>&1 | head -1", "{} >&- 2>&-"])
def test_output_that_cannot_be_written_ends_no_training(tmp_path: Path, code: str) -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", code.format('"$@"'), "bash", *command("main", str(tmp_path / "done"))],
        capture_output=True, text=True, timeout=HANG_SECS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    ("body", "code", "said"), [("mistake", 2, "Wrong."), ("fail", 1, "Saving failed.")]
)
def test_an_error_is_its_message_and_its_exit_code(body: str, code: int, said: str) -> None:
    done = subprocess.run(command(body), capture_output=True, text=True, timeout=HANG_SECS)
    assert (done.returncode, done.stderr) == (code, f"{said}\n")


def test_after_the_imports_garbage_is_collected_again_and_their_objects_are_left_alone() -> None:
    body = """
import gc, os
from savepoint import entry
try:
    with entry.importing():
        import torch
        assert not gc.isenabled()
        raise KeyboardInterrupt
except KeyboardInterrupt:
    print(gc.isenabled(), gc.get_freeze_count() > 100_000)
with entry.importing():
    print(gc.isenabled())
"""
    done = subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, timeout=HANG_SECS
    )
    assert (done.stdout, done.stderr) == ("True True\nTrue\n", "")


@pytest.mark.parametrize(
    ("isatty", "term", "during", "after"),
    [
        (True, "xterm", "Loading PyTorch ...", "Loading PyTorch ...\r\x1b[K"),
        (True, "dumb", "", ""),
        (False, "xterm", "", ""),
    ],
)
def test_the_imports_are_announced_once_on_a_terminal_alone(
    isatty: bool, term: str, during: str, after: str
) -> None:
    body = f"""
import io, sys
from savepoint import entry
class Shown(io.StringIO):
    def isatty(self): return {isatty}
sys.stderr = Shown()
with entry.importing(), entry.importing():  # what is imported may say so itself
    print(repr(sys.stderr.getvalue()))
print(repr(sys.stderr.getvalue()))
"""
    environment = os.environ | {"TERM": term}
    done = subprocess.run(
        [sys.executable, "-c", body],
        capture_output=True,
        text=True,
        timeout=HANG_SECS,
        env=environment,
    )
    assert done.stdout == f"{during!r}\n{after!r}\n"


@pytest.mark.parametrize(
    ("end", "code", "last"),
    [
        ("return 0", 0, ""),
        ("raise errors.ConfigError('Wrong.')", 2, "Wrong."),
        ("raise preemption.Preempted(15)", 143, "Stopped by SIGTERM."),
        ("raise RuntimeError('a mistake')", 1, "RuntimeError: a mistake"),
        ("os.kill(os.getpid(), 15)", 143, "Stopped by SIGTERM."),
    ],
)
def test_the_end_waits_for_threads_and_exit_handlers_and_loses_no_output(
    tmp_path: Path, end: str, code: int, last: str
) -> None:
    body = f"""
import atexit, os, threading, time
from savepoint import entry, errors, preemption

def main(argv):
    with entry.importing():
        pass
    global never_closed
    never_closed = open({str(tmp_path / "file")!r}, "w")
    never_closed.write("a user's")
    atexit.register(print, "handler")
    threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
    print("main")
    {end}

entry.run(main, {str(ROOT / "train.py")!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", body], capture_output=True, text=True, timeout=HANG_SECS
    )
    assert (done.returncode, done.stdout.split()) == (code, ["main", "thread", "handler"])
    assert (tmp_path / "file").read_text() == "a user's"
    assert done.stderr.strip().endswith(last)
    assert ("Traceback" in done.stderr) == (code == 1)


FINALIZED = f"""
from savepoint import entry, errors

class Said:
    def __init__(self, text): self.text, self.itself = text, self
    def __del__(self): print(self.text, flush=True)

def main(argv):
    with entry.importing():
        pass
    Said("training's")
    global held
    held = Said("module's")
    return 3

entry.run(main, {str(ROOT / "train.py")!r})
"""


def test_at_the_end_what_a_training_left_behind_is_finalized_and_modules_are_not_taken_apart() -> (
    None
):
    done = subprocess.run(
        [sys.executable, "-c", FINALIZED], capture_output=True, text=True, timeout=HANG_SECS
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "training's\n", "")


def test_an_exit_handler_that_was_there_before_us_is_called_and_nothing_stays_frozen(
    tmp_path: Path,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, gc; atexit.register(lambda: print('frozen:', gc.get_freeze_count()))"
    )
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    }
    done = subprocess.run(
        [sys.executable, "-c", FINALIZED],
        capture_output=True,
        text=True,
        timeout=HANG_SECS,
        env=environment,
    )
    assert (done.returncode, "frozen: 0" in done.stdout, done.stderr) == (3, True, "")


COMPRESSED = f"""
import gzip, io
from savepoint import entry

def main(argv):
    global target, text
    target = open(argv[0], "wb")
    text = io.TextIOWrapper(gzip.GzipFile(fileobj=target, mode="wb"))
    text.write("all of it")
    return 0

entry.run(main, {str(ROOT / "train.py")!r})
"""


def test_a_file_that_a_module_holds_is_closed_and_what_writes_into_another_one_first(
    tmp_path: Path,
) -> None:
    file = tmp_path / "held.gz"
    subprocess.run([sys.executable, "-c", COMPRESSED, file], check=True, timeout=HANG_SECS)
    with gzip.open(file, "rt") as text:
        assert text.read() == "all of it"


@pytest.mark.parametrize(
    "before",
    [
        pytest.param("sys.modules['mpi4py'] = sys", id="a library that finishes in C"),
        pytest.param(
            "end = open(os.pipe()[1], 'wb')\n"
            "threading.Thread(target=end.write, args=(bytes(10**6),), daemon=True).start()\n"
            "time.sleep(0.2)",
            id="a thread in the middle of a write that nobody reads",
        ),
    ],
)
def test_python_itself_ends_a_process_with(before: str) -> None:
    script = f"import os, sys, threading, time\n{before}\n{FINALIZED}"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=HANG_SECS
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert set(done.stdout.splitlines()) == {"training's", "module's"}


HOST = """
import runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
except SystemExit as left:
    print(left.code)
raise ValueError("the host's own")
"""


def test_a_program_that_runs_ours_within_it_ends_with_its_own_exit_code(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FINALIZED)
    done = subprocess.run(
        [sys.executable, "-c", HOST, script], capture_output=True, text=True, timeout=HANG_SECS
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[:1] == ["3"]
    assert "the host's own" in done.stderr


def test_a_signal_whose_exception_python_drops_ends_the_process_all_the_same() -> None:
    """Where a handler runs within the callback of a weak reference, as in an import, nothing that
    it raises goes on.
    """
    done = subprocess.run(command("dropped"), capture_output=True, text=True, timeout=HANG_SECS)
    assert (done.returncode, done.stderr) == (143, "Stopped by SIGTERM.\n")


LAUNCHER = f"""
import os, subprocess, sys
told = dict(zip(sys.argv[1::2], sys.argv[2::2]))
ranks = [
    subprocess.Popen([sys.executable, "-c", {HEAD!r} + chr(10) + "entry.run(" + body + ", {str(ROOT / "train.py")!r})"],
                     env=os.environ | {{"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "3"}})
    for rank, body in told.items()
]
print([rank.wait() for rank in ranks])
"""


def launched(**bodies: str) -> tuple[str, list[str]]:
    """Exit codes of the ranks, and the lines that they said."""
    words = [word for rank, body in bodies.items() for word in (rank[1:], body)]
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, *words], capture_output=True, text=True, timeout=HANG_SECS
    )
    return done.stdout.strip(), done.stderr.splitlines()


def test_what_all_ranks_refuse_is_said_once() -> None:
    for _ in range(2):  # a second start says it again
        assert launched(r0="mistake", r1="mistake", r2="mistake") == ("[2, 2, 2]", ["Wrong."])


def test_what_a_rank_alone_refuses_is_said_too() -> None:
    assert launched(r0="mistake", r1="fail") == ("[2, 1]", ["Wrong.", "Saving failed."])
    assert launched(r1="fail", r2="fail") == ("[1, 1]", ["Saving failed."])


def test_the_death_of_another_rank_is_one_line() -> None:
    gloo = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:40012"
    codes, said = launched(r1=f"lambda argv: (_ for _ in ()).throw(RuntimeError({gloo!r}))")
    assert codes == "[1]"
    assert said == ["Another rank is gone (its own output says why): rank 1 cannot go on alone."]
    codes, said = launched(
        r1="lambda argv: (_ for _ in ()).throw(RuntimeError('a fault of the model'))"
    )
    assert codes == "[1]"
    assert said[-1] == "RuntimeError: a fault of the model"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, 1), ({"RANK": "1"}, 0), ({"TORCHELASTIC_MAX_RESTARTS": "0"}, 0), ({"TORCHELASTIC_RESTART_COUNT": "1"}, 0),
        ({"TORCHELASTIC_USE_AGENT_STORE": "False"}, 0),
    ],
)  # fmt: skip
def test_a_torchrun_whose_restarts_share_a_store_is_told_so_once(
    changed: dict[str, str],
    said: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {"RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    for name, value in (given | {"TORCHELASTIC_MAX_RESTARTS": "3"} | changed).items():
        monkeypatch.setenv(name, value)
    entry.warn_of_shared_store()
    assert capsys.readouterr().err.count("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == said

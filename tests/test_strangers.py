"""Files, records and addresses of strangers, given to every entry point: none of their programs
runs.

The entry points are called in this process, and two of them as processes of their own.
"""

import os
import pickle
import runpy
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoint_files import facts, small_state
from support.forked import Program
from support.programs import as_a_new_process

from savepoint import commands, entry, preemption
from savepoint.checkpoint import manifest, store
from savepoint.checkpoint.archive import Archive
from savepoint.config import compose

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [
    "train.py", "--data", "configs/data/digits.yaml", "--data.batch_size", "16",
    "--trainer.limit_train_batches", "2", "--trainer.max_epochs", "1",
    "--model.net.width", "4", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1",
    "--trainer.accelerator", "cpu", "--trainer.log_every_n_steps", "1",
]  # fmt: skip
MARKER = "it-ran"


class Payload:
    """Unpickled, it leaves a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def payload(path: Path) -> Payload:
    return Payload(path.parent / MARKER)


# -- what is given -------------------------------------------------------------------------------


def zipped(path: Path) -> None:
    torch.save({"state_dict": small_state()["state_dict"], "x": payload(path)}, path)


def before_zip(path: Path) -> None:
    torch.save({"state_dict": {}, "x": payload(path)}, path, _use_new_zipfile_serialization=False)


def bare(path: Path) -> None:
    path.write_bytes(pickle.dumps(payload(path)))


def sealed(path: Path, **more: Any) -> None:
    """It verifies: whoever writes a file can seal it too."""
    with path.open("w+b") as file:
        archive = Archive(file)
        archive.save(small_state() | {"x": payload(path)} | more)
        archive.seal(facts(99, 1.0) | {"ended": None, "exact": True})
    assert manifest.diagnose(path) == ""


def in_hyper_parameters(path: Path) -> None:
    sealed(path, x=0, hyper_parameters={"lr": payload(path)})


def in_the_config(path: Path) -> None:
    """Plain values alone, and a text that is a program to an unsafe reader of YAML."""
    text = f"model: !!python/object/apply:os.system ['touch {path.parent / MARKER}']\n"
    store.write(
        path, small_state() | {"config": text}, facts(99, 1.0) | {"ended": None, "exact": True}
    )


def in_a_script(path: Path) -> None:
    """What torch takes for a TorchScript program, which it would run, and says how."""
    with path.open("w+b") as file:
        archive = Archive(file)
        archive.save(small_state())
        archive.write_record("constants.pkl", b"", 0)
        archive.seal(facts(99, 1.0) | {"ended": None, "exact": True})
    assert manifest.diagnose(path) == ""


def called_safetensors(path: Path) -> Path:
    named = path.with_suffix(".safetensors")
    bare(named)
    return named


ALONE = [called_safetensors]  # no run holds a file of that name
FILES: list[Callable[[Path], Path | None]] = [
    zipped, before_zip, bare, sealed, in_hyper_parameters, in_the_config, in_a_script, *ALONE,
]  # fmt: skip

# -- to whom --------------------------------------------------------------------------------------


def program(script: str, *argv: str) -> int:
    """`python SCRIPT ...`, from its command line to its exit code."""
    main = runpy.run_path(str(ROOT / script))["main"]
    with pytest.MonkeyPatch.context() as patch, as_a_new_process():
        patch.setattr(sys, "argv", [script, *argv])
        patch.setattr(entry, "tolerant", lambda stream: stream)
        with pytest.raises(SystemExit) as ended:
            entry.run(main, str(ROOT / script), "configs/mnist.yaml")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def train(*argv: str) -> int:
    return program(*TRAIN, *argv)


def resume(*argv: str) -> int:
    return program("resume.py", *argv)


# How each is given a FILE, or a RUN that has it as its only checkpoint, in OUTPUTS.
ENTRIES: dict[str, tuple[Callable[..., int], list[str]]] = {
    "init_from": (train, ["--init_from", "FILE", "--output_dir", "OUTPUTS"]),
    "resume auto": (train, ["--resume", "auto", "--output_dir", "OUTPUTS", "--run_name", "run"]),
    "file": (resume, ["FILE", "--output_dir", "OUTPUTS"]),
    "file with a config": (
        resume,
        ["FILE", "--config", "configs/fast.yaml", "--output_dir", "OUTPUTS"],
    ),
    "run": (resume, ["RUN"]),
    "newest run": (resume, ["--output_dir", "OUTPUTS"]),
    "plan": (resume, ["RUN", "--plan"]),
    "plan of a file": (resume, ["FILE", "--plan"]),
    "fork": (resume, ["RUN", "--fork", "other", "--output_dir", "OUTPUTS"]),
    "best": (resume, ["RUN", "--best"]),
}
MORE_WORDS = {
    "ls": [["OUTPUTS"]],
    "diff": [["FILE", "FILE"], ["RUN", "RUN"]],
    "show": [["FILE", "--only", "config"], ["FILE", "--only", "lineage"]],
    "verify": [["FILE", "--deep"]],
    "gc": [["RUN", "--dry-run"]],
    "export": [["FILE", "--format", kind] for kind in ("safetensors", "npz", "state_dict", "pt2")],
}
ASKED = {
    " ".join([name, *words]): [name, *words]
    for name in commands.COMMANDS
    for words in (["FILE"], ["RUN"], *MORE_WORDS.get(name, []))
}


@pytest.fixture(autouse=True)
def no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process keeps its own handlers."""
    monkeypatch.setattr(preemption, "install", lambda: None)


@pytest.fixture
def outputs(tmp_path: Path) -> Iterator[Path]:
    """With an empty run; nothing has run at the end."""
    (tmp_path / "outputs" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "outputs" / "run" / "run.json").write_text(
        '{"created": "2026-01-01", "starts": [{"time": "2026-01-01"}]}'
    )
    yield tmp_path / "outputs"
    assert not list(tmp_path.rglob(MARKER)), "a payload ran"


def given(words: list[str], outputs: Path, file: Path | str) -> list[str]:
    paths = {"FILE": file, "RUN": outputs / "run", "OUTPUTS": outputs}
    return [str(paths.get(word, word)) for word in words]


def make(kind: Callable[[Path], Path | None], outputs: Path) -> Path:
    """The file, beside the run and in it."""
    if kind not in ALONE:
        kind(outputs / "run" / "checkpoints" / "step-00000099.ckpt")
    return kind(outputs / "file.ckpt") or outputs / "file.ckpt"


def kinds(words: list[str]) -> list[Callable[[Path], Path | None]]:
    return [kind for kind in FILES if "FILE" in words or kind not in ALONE]


def check_said(code: int, said: Any, codes: set[int], what: str = "") -> None:
    text = f"{what}: {said.out}{said.err}"
    assert code in codes, text
    assert "Traceback" not in text
    assert "weights_only" not in text
    if code == 2:
        assert 1 <= len(said.err.splitlines()) <= 5, text


@pytest.mark.parametrize("name", ENTRIES)
def test_no_program_in_a_file_runs(
    name: str, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call, words = ENTRIES[name]
    for kind in kinds(words):
        code = call(*given(words, outputs, make(kind, outputs)))
        check_said(code, capsys.readouterr(), {2}, kind.__name__)


@pytest.mark.parametrize("name", ASKED)
def test_no_command_runs_a_program_in_a_file(
    name: str, outputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a listing shows of it stands in its manifest, which is text: 0 is right there."""
    for kind in kinds(ASKED[name]):
        code = commands.main(given(ASKED[name], outputs, make(kind, outputs)))
        check_said(code, capsys.readouterr(), {0, 1, 2}, kind.__name__)


def test_no_program_in_a_file_runs_in_a_process_of_its_own(outputs: Path) -> None:
    """Whatever the environment tells torch about loads that do not say which kind they are."""
    unsafe = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    training = [*TRAIN, "--init_from", str(make(sealed, outputs)), "--output_dir", str(outputs)]
    with Program(training, outputs / "log", **unsafe) as program:
        assert program.wait() == 2, program.said
        assert "Traceback" not in program.said
    file, log = make(bare, outputs), outputs / "log"
    with Program(["resume.py", str(outputs / "run")], log, **unsafe) as program:
        assert program.wait() == 2, program.said
        assert 1 <= len(program.said.splitlines()) <= 5
        assert "Traceback" not in program.said
    done = subprocess.run(
        [sys.executable, "-m", "savepoint", "verify", str(file)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | unsafe,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert 1 <= len(done.stdout.splitlines()) <= 5
    assert "Traceback" not in done.stderr


# -- a run directory's other files ---------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("outputs")
    with pytest.MonkeyPatch.context() as patch:  # made before what is patched for each test
        patch.setattr(preemption, "install", lambda: None)
        assert train("--output_dir", str(outputs), "--run_name", "run") == 0
    return outputs


@pytest.fixture
def run_of_ours(finished: Path, tmp_path: Path) -> Iterator[Path]:
    outputs = Path(shutil.copytree(finished, tmp_path / "outputs"))
    yield outputs
    assert not list(tmp_path.rglob(MARKER)), "a payload ran"


def test_no_program_in_a_record_runs(run_of_ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The checkpoints are whole, and the run has ended: there is nothing left to train."""
    marker = run_of_ours / MARKER
    for_yaml = f"model: !!python/object/apply:os.system ['touch {marker}']\n".encode()
    records = dict.fromkeys(
        ("run.json", "summary.json", "metrics.csv", "lock"), pickle.dumps(Payload(marker))
    )
    records |= dict.fromkeys(("config.yaml", "RESUME.txt"), for_yaml)
    for asked in (["RUN", "--plan"], ["RUN"], *([name, "RUN"] for name in commands.COMMANDS)):
        for name, content in records.items():
            (run_of_ours / "run" / name).write_bytes(content)
        words = given(asked, run_of_ours, "")
        code = commands.main(words) if asked[0] in commands.COMMANDS else resume(*words)
        check_said(code, capsys.readouterr(), {0, 1, 2})


# -- addresses -----------------------------------------------------------------------------------

URLS = ["http://localhost:9/a.ckpt", "https://localhost:9/a.ckpt", "s3://bucket/a.ckpt"]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", [name for name, (_, words) in ENTRIES.items() if "FILE" in words])
def test_no_address_is_loaded(
    name: str, run_of_ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call, words = ENTRIES[name]
    for url in [*URLS, (run_of_ours / "run" / "checkpoints" / "last.ckpt").as_uri()]:
        code = call(*given(words, run_of_ours, url))
        said = capsys.readouterr()
        check_said(code, said, {2})
        assert "URL" in said.err
        assert url.split("//")[1] in said.err


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("url", [*URLS, "file:///etc/hostname"])
def test_no_config_is_read_from_an_address(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = train("--config", url, "--output_dir", str(tmp_path))
    check_said(code, capsys.readouterr(), {2})
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", [name for name, words in ASKED.items() if "FILE" in words])
def test_no_command_loads_an_address(
    name: str, run_of_ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for url in [*URLS, (run_of_ours / "run" / "checkpoints" / "last.ckpt").as_uri()]:
        code = commands.main(given(ASKED[name], run_of_ours, url))
        check_said(code, capsys.readouterr(), {2})


# -- what a config names -------------------------------------------------------------------------

PROGRAMS = {
    "os.system": {"command": "touch MARKER"},
    "subprocess.Popen": {"args": ["touch", "MARKER"]},
    "builtins.exec": {"source": "open('MARKER', 'w')"},
}
PLACES = ["model", "data", "model.net", "callback", "logger"]


def renamed(run_of_ours: Path, place: str, name: str, arguments: Any = None) -> Path:
    """A whole checkpoint whose config names `name` at `place`."""
    state, its_facts = store.load(run_of_ours / "run" / "checkpoints" / "last.ckpt")
    config = compose.parse_yaml(state["config"], "the config")
    named = {"class_path": name} | ({"init_args": arguments} if arguments else {})
    if place == "model.net":
        config["model"]["init_args"]["net"] = named
    elif place in ("callback", "logger"):
        config["trainer"]["callbacks" if place == "callback" else "logger"] = [named]
    else:
        config[place] = named
    kept = {
        key: value
        for key, value in its_facts.items()
        if key not in ("digest", "body", "format_version", "ended")
    }
    return store.write(
        run_of_ours / "file.ckpt",
        state | {"config": compose.to_yaml(config)},
        kept | {"ended": None},
    ).path


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("place", PLACES)
def test_a_config_that_names_what_is_no_class_of_its_place_is_refused(
    place: str, name: str, run_of_ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = repr(PROGRAMS[name]).replace("MARKER", str(run_of_ours / MARKER))
    file = renamed(run_of_ours, place, name, compose.parse_yaml(text, "the arguments"))
    code = resume(str(file), "--output_dir", str(run_of_ours))
    said = capsys.readouterr()
    check_said(code, said, {2})
    assert name in said.err


@pytest.fixture
def named_by_a_stranger(
    run_of_ours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A checkpoint whose config names a class of a module that can be imported here, and leaves a
    file when it is.
    """
    (tmp_path / "of_a_stranger.py").write_text(
        f"import os\nos.mkdir({str(tmp_path / 'imported')!r})\nclass Model: ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield renamed(run_of_ours, "model", "of_a_stranger.Model")
    sys.modules.pop("of_a_stranger", None)


@pytest.mark.parametrize(
    "words", [["FILE", "--plan"], ["FILE", "--trainer.max_epochs", "2"]], ids=["plan", "resume"]
)
def test_a_resume_imports_what_the_config_names_so_a_strangers_is_not_to_be_resumed(
    words: list[str], named_by_a_stranger: Path, tmp_path: Path
) -> None:
    assert resume(*given(words, tmp_path, named_by_a_stranger), "--output_dir", str(tmp_path)) == 2
    assert (tmp_path / "imported").exists()
    assert (
        "its config is not to be resumed, nor evaluated, nor exported"
        in (ROOT / "docs/exactness.md").read_text()
    )


BUILDING = ("eval", "export")  # the model, as a resume does


@pytest.mark.parametrize(
    "name", [name for name, words in ASKED.items() if "FILE" in words and words[0] not in BUILDING]
)
def test_no_command_that_only_reads_imports_what_the_config_names(
    name: str, named_by_a_stranger: Path, tmp_path: Path
) -> None:
    commands.main(given(ASKED[name], tmp_path, named_by_a_stranger))
    assert not (tmp_path / "imported").exists()


def test_to_begin_with_the_weights_of_a_file_imports_nothing_that_its_config_names(
    named_by_a_stranger: Path, tmp_path: Path
) -> None:
    assert (
        train("--init_from", str(named_by_a_stranger), "--output_dir", str(tmp_path / "new")) == 0
    )
    assert not (tmp_path / "imported").exists()

"""make test ARGS=tests/config/test_precheck.py"""

import subprocess
import sys
from pathlib import Path

import pytest

from savepoint.config import quick
from savepoint.errors import (
    CheckpointError,
    CheckpointForeignError,
    CheckpointNotFoundError,
    ConfigError,
    RunExistsError,
)
from savepoint.resume import request


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text("model: {class_path: M}\ndata: {class_path: D}\n")
    return tmp_path


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as raised:
        quick.check(argv)
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "Empty config file: bad.yaml."),
        ("{}", "Empty config file: bad.yaml."),
        ("- 1", "A config file that is no mapping of keys to values: bad.yaml."),
        ("trainer: {max_epochs: 3", "Malformed YAML: bad.yaml, line 1, column 24"),
        ("trainer:\n\tmax_epochs: 3", "Malformed YAML: bad.yaml, line 2, column 1"),
        (
            "trainer: {}\ntrainer: {}",
            "Malformed YAML: bad.yaml, line 2, column 1 (the key 'trainer' twice).",
        ),
        ("trianer: {}", "Unknown key in bad.yaml: trianer. Did you mean trainer?"),
        ("zzz: 3", "Unknown key in bad.yaml: zzz. It is none of seed_everything, output_dir,"),
        ("trainer: 3", "Not a group: `trainer` is 3 (bad.yaml)."),
        ("trainer:", "Nothing in `trainer`: bad.yaml."),
        (
            "checkpoint: short",
            "Not a group file: short (`checkpoint`, bad.yaml). configs/checkpoint has: ",
        ),
        (
            "model: {lr: 3}",
            "Unknown key in `model`: lr (bad.yaml). Expected `class_path` and `init_args`.",
        ),
        (
            "model: {class_pat: 3}",
            "Unknown key in `model`: class_pat (bad.yaml). Expected `class_path` and "
            "`init_args`. Did",
        ),
        ("model: {init_args: {}}", "No class chosen by `model`: bad.yaml."),
        ("model: nope.yaml", "No such model group file: nope.yaml."),
        ("model: {class_path: M}", "No class chosen for `data`: bad.yaml names none."),
        (
            "class_path: M",
            "A group file where a config was expected: bad.yaml. Give it with --model.",
        ),
    ],
)
def test_a_bad_config_file_is_refused_with_its_name(here: Path, text: str, message: str) -> None:
    (here / "bad.yaml").write_text(text)
    assert refusal("--config", "bad.yaml").startswith(message)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--config", "A flag without its value: --config. Expected --config configs/fast.yaml."),
        (
            "--run_name --model.lr 3",
            "A flag without its value: --run_name. Expected --run_name VALUE.",
        ),
        (
            "--config god.yaml",
            "No such config file: god.yaml. . has: good.yaml. Did you mean good.yaml?",
        ),
        (
            "--config nowhere/god.yaml",
            "No such config file: nowhere/god.yaml. The folder /HERE/nowhere does not exist "
            "either.",
        ),
        ("--config .", "Not a config file but a folder: .. . has: good.yaml."),
        (
            "good.yaml",
            "Unexpected word on the command line: good.yaml. Expected --KEY VALUE. Did you mean "
            "--config good.yaml?",
        ),
        ("--run_name.x 3", "Unknown flag: --run_name.x. Did you mean --run_name?"),
        ("---x 3", "Unknown flag: ---x."),
        ("-x 3", "Unexpected word on the command line: -x."),
        (
            "--config good.yaml --model good.yaml",
            "A whole configuration where a group was expected: good.yaml, given as `model`.",
        ),
        ("--config good.yaml --trainer 3", "Not a group file: 3 (`trainer`, --trainer)."),
        ("--config good.yaml --data x.yaml", "No such data group file: x.yaml. . has: good.yaml."),
        ("--config good.yaml --model {a:", "Malformed YAML: the command line, line 1"),
    ],
)
def test_a_bad_command_line_is_refused_with_the_flag(here: Path, argv: str, message: str) -> None:
    assert refusal(*argv.split(" ")).startswith(message.replace("/HERE", str(here)))


def test_a_group_file_that_is_missing_is_answered_with_those_that_are_there() -> None:
    message = refusal("--data", "configs/data/fashon.yaml")
    assert message.endswith(
        "configs/data has: digits.yaml, fashion.yaml, mnist.yaml, workers.yaml. Did you mean "
        "fashion.yaml?"
    )


def test_a_config_file_that_is_not_text_is_refused(here: Path) -> None:
    (here / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal("--config", "bad.yaml").startswith("A config file that cannot be read: bad.yaml")


def test_a_good_command_line_passes(here: Path) -> None:
    quick.check(
        [
            "-c",
            "good.yaml",
            "--model.anything.at_all",
            "3",
            "--trainer.callbacks+=Timer",
            "--run_name=x",
        ]
    )


def test_help_is_short_and_leaves_with_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        quick.check(["--nonsense", "3", "--help"])
    assert left.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) < 30


def test_the_check_imports_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from savepoint.config import quick; quick.check(['--config', "
        "'configs/mnist.yaml']); print(sorted({'torch', 'lightning', 'numpy', 'jsonargparse'} & "
        "set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        == "[]\n"
    )


def test_a_name_that_is_taken_is_told_before_the_imports(tmp_path: Path) -> None:
    (tmp_path / "there" / "checkpoints").mkdir(parents=True)
    argv = ["--output_dir", str(tmp_path), "--run_name", "there"]
    with pytest.raises(RunExistsError, match="The run name is taken"):
        quick.check(argv)
    quick.check([*argv, "--resume", "auto"])
    quick.check([*argv, "--print_config"])


@pytest.mark.parametrize("inside", [[], ["lost+found"]])
def test_an_empty_directory_is_a_place_to_start(tmp_path: Path, inside: list[str]) -> None:
    for name in ["there", *(f"there/{name}" for name in inside)]:
        (tmp_path / name).mkdir()
    quick.check(["--output_dir", str(tmp_path), "--run_name", "there"])


@pytest.mark.parametrize(
    "url", ["s3://bucket/x", "gs://b", "memory://m", "file:///tmp/x", "hdfs:/x"]
)
@pytest.mark.parametrize("key", ["output_dir", "trainer.default_root_dir"])
def test_a_url_to_save_to_is_refused_before_the_imports(here: Path, key: str, url: str) -> None:
    assert refusal(f"--{key}", url).startswith(f"Nothing is saved to a URL: {key} is {url}. ")
    group, _, name = key.rpartition(".")
    (here / "url.yaml").write_text(
        f"{group}: {{{name}: '{url}'}}\n" if group else f"{name}: '{url}'\n"
    )
    assert refusal("--config", "good.yaml", "--config", "url.yaml").startswith(
        f"Nothing is saved to a URL: {key} is"
    )
    if key == "output_dir":
        with pytest.raises(ConfigError, match="Nothing is saved to a URL"):
            request.requested(["--output_dir", url])


@pytest.mark.parametrize("word", ["false", "False"])
def test_a_training_that_is_not_to_be_saved_is_refused_in_our_own_words(word: str) -> None:
    said = refusal("--trainer.enable_checkpointing", word)
    assert said.startswith("Saving cannot be off: trainer.enable_checkpointing is false. ")
    assert "ModelCheckpoint" not in said


@pytest.mark.parametrize("name", [".", "..", "../x", "a/b", ".hidden", "x" * 300])
def test_a_name_that_is_none_of_a_directory_is_refused_first(name: str) -> None:
    with pytest.raises(ConfigError, match="Not a run name"):
        quick.check(["--run_name", name])
    with pytest.raises(ConfigError, match="Not a run name"):
        request.requested(["somewhere", f"--fork={name}"])


def test_a_config_with_a_name_that_is_too_long_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"No such config file: x{200}"):
        quick.check(["--config", "x" * 300])


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.ckpt", "No checkpoint there: none.ckpt"),
        ("notes.md", "Not a checkpoint of Savepoint: notes.md. .*; this is a text file"),
        ("https://example.org/a.ckpt", "No checkpoint is loaded from a URL: https://example"),
        (".", "A directory, not a checkpoint"),
    ],
)
def test_weights_that_are_none_are_refused_before_the_slow_imports(
    here: Path, path: str, said: str
) -> None:
    (here / "notes.md").write_text("# Notes")
    with pytest.raises(CheckpointError, match=said):
        quick.check(["--config", "good.yaml", "--init_from", path])


def test_a_run_that_goes_on_needs_the_weights_it_began_with_no_more(here: Path) -> None:
    quick.check(["--config", "good.yaml", "--init_from", "gone.ckpt", "--resume", "auto"])


@pytest.mark.parametrize("flags", [[], ["--config", "good.yaml"]])
def test_a_resume_of_a_text_file_is_refused_in_one_message_with_a_config_and_without(
    here: Path, flags: list[str]
) -> None:
    (here / "notes.md").write_text("# Notes")
    with pytest.raises(CheckpointForeignError, match=r"a text file\. Name a checkpoint"):
        request.requested(["notes.md", *flags])


def test_a_resume_of_a_url_shows_it_as_it_was_typed() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"URL: https://example\.org/a\.ckpt"):
        request.requested(["https://example.org/a.ckpt"])

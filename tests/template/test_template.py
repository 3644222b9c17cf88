"""A copy of the template: what is in it, how it gets a newer library, and that other projects train
in it.

The template of these tests is the working tree, committed to a repository of its own.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.copies import (  # noqa: F401  (committed, newer and wheel are fixtures)
    call,
    commit,
    committed,
    environment,
    files,
    git,
    newer,
    unpacked,
    wheel,
)
from support.limits import HANG_SECS, LONGER_SECS
from support.programs import ROOT
from support.projects import PROJECTS, make_it_yours
from support.small import difference, final_state, rows

import savepoint
from savepoint.checkpoint import store
from savepoint.template.new import LEFT_OUT

NEXT = "  cd {}\n  make train\n  make test\n"
MOST_FILES, MOST_LINES = 45, 2500
TRAINING = [
    "train.py", "--config", "configs/mine.yaml", "--checkpoint.save_every_steps", "5",
    "--trainer.max_epochs", "4", "--run_name",
]  # fmt: skip
# Right, and nothing that mypy would take: as Lightning's own examples are written.
ORDINARY = """
from typing import Dict, List

import torch, torchvision
from lightning.pytorch import LightningModule

class Gan(LightningModule):
    def __init__(self, lr: float = 0.01, widths: list = [64, 64], names: Dict[str, List] = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.register_buffer("mask", torch.ones(2))
        self.best = None

    def training_step(self, batch, batch_idx: int) -> dict:
        self.best = self.mask[0] * 1.0
        self.logger.experiment.add_image("one", torchvision.utils.make_grid(batch), self.current_epoch)
        for a, b in zip(self.hparams.widths, self.hparams.widths[1:]):
            l = a * b
        loss = self(batch).sum() * l
        return loss

    def configure_optimizers(self) -> dict:
        return {"optimizer": torch.optim.Adam(self.parameters(), self.hparams.lr)}
"""
Trained = Callable[[str], Path]
VENDORED = f"vendor/savepoint_lightning-{savepoint.__version__}-py3-none-any.whl"


@pytest.fixture
def template(committed: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(committed, tmp_path / "template"))


def make(template: Path, destination: Path, wheel: Path, **more: str) -> Path:
    done = call(template, "new", "--wheel", str(wheel), "cats", str(destination), **more)
    assert done.returncode == 0, done.stderr
    return destination


@pytest.fixture(scope="module")
def cats(committed: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to read."""
    return make(committed, tmp_path_factory.mktemp("copies") / "cats", wheel)


@pytest.fixture
def copy(cats: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(cats, tmp_path / "cats"))


def project_of(copied: dict[str, bytes]) -> dict[str, object]:
    return tomllib.loads(copied["pyproject.toml"].decode())["project"]


def test_a_copy_is_what_is_committed_under_a_name_of_its_own(template: Path, wheel: Path) -> None:
    original = files(template)
    (template / "train.py").write_text("not committed")
    done = call(template, "new", "--wheel", str(wheel), "black-cats", "../somewhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(NEXT.format("../somewhere"))
    assert "Not copied: what is not committed (1 in git status).\n" in done.stdout
    copy = template.parent / "somewhere"
    copied = files(copy)
    for name in ("train.py", "Makefile", "src/project/model.py", "tests/test_project.py"):
        assert copied[name] == original[name], name
    assert copied[VENDORED] == wheel.read_bytes()
    assert copied["README.md"].decode().startswith("# black-cats\n")
    assert os.access(copy / ".ci/run", os.X_OK)
    project = project_of(copied)
    assert (project["name"], project["version"]) == ("black-cats", "0.1.0")
    assert {"license", "authors"} & project.keys() == set()
    name = "from savepoint.run import default_name; print(default_name('mnist'))"
    made = subprocess.check_output(
        [sys.executable, "-B", "-c", name], cwd=copy, env=environment(copy), text=True
    )
    assert re.fullmatch(r"black-cats-mnist-\d{8}-\d{6}\n", made)
    assert git(copy, "status", "--porcelain", "--ignored") == ""
    subject = f"black-cats, from Savepoint ({git(template, 'rev-parse', 'HEAD')[:7]})"
    assert git(copy, "log", "--format=%s %D") == f"{subject} HEAD -> main"
    left = sorted(path.name for path in template.parent.iterdir())
    assert left == ["somewhere", "template"]


def test_a_copy_is_thin(cats: Path) -> None:
    copied = files(cats)
    assert {name.split("/")[0] for name in copied} == {
        ".ci", ".dockerignore", ".github", ".gitignore", ".pre-commit-config.yaml", "Dockerfile", "Makefile", "README.md",
        "configs", "pyproject.toml", "requirements.txt", "resume.py", "src", "tests", "train.py", "vendor",
    }  # fmt: skip
    assert {name.split("/")[1] for name in copied if name.startswith("src/")} == {"project"}
    assert set(LEFT_OUT) & copied.keys() == set()
    assert [name for name in LEFT_OUT if not (ROOT / name).is_file()] == []
    lines = sum(text.count(b"\n") for name, text in copied.items() if not name.endswith(".whl"))
    print(f"a copy: {len(copied)} files, {lines} lines and the wheel")
    assert len(copied) <= MOST_FILES
    assert lines <= MOST_LINES


def test_a_copy_needs_its_own_files_and_wheel_alone(cats: Path) -> None:
    copied = files(cats)
    named = copied["requirements.txt"].decode().splitlines()
    assert [line for line in named if line.startswith(("./", "-e"))] == [f"./{VENDORED}", "-e ."]
    assert project_of(copied)["dependencies"][0].startswith("savepoint-lightning")  # type: ignore[index]
    texts = [copied[name].decode() for name in ("Makefile", "README.md", ".ci/run")]
    for gone in ("benchmarks/drill", "template-diff", "template-update", "template.toml"):
        assert not any(gone in text for text in texts), gone
    targets = re.findall(r"^make (\S+)", copied["README.md"].decode(), re.MULTILINE)
    for target in [*targets, "extras", "upgrade"]:
        done = subprocess.run(
            ["make", "--dry-run", target], cwd=cats, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert (
        subprocess.run(["make", "--dry-run", "new"], cwd=cats, capture_output=True).returncode == 2
    )


def test_a_copy_installs_nothing_for_many_clients_before_it_has_a_config_for_them(
    copy: Path,
) -> None:
    done = subprocess.run(["make", "federate"], cwd=copy, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No such config file: configs/federated/digits.yaml. A copy" in done.stderr
    assert not (copy / ".venv").exists()


def test_a_copy_without_the_examples_prediction_is_told_whose_it_was(copy: Path) -> None:
    (copy / "src/project/predict.py").unlink()
    done = subprocess.run(
        ["make", "-o", "setup", "predict"],
        cwd=copy,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "No src/project/predict.py. It belongs to the example" in done.stderr


def test_the_code_of_a_copy_is_as_typed_as_its_owner_likes(cats: Path) -> None:
    rules = tomllib.loads((cats / "pyproject.toml").read_text())["tool"]
    [own] = rules["mypy"]["overrides"]
    assert (rules["mypy"]["strict"], own["module"], own["ignore_errors"]) == (
        True,
        "project.*",
        True,
    )


def test_the_linters_let_the_owner_of_a_copy_lay_out_his_code(copy: Path) -> None:
    ordinary = copy / "src/project/ordinary.py"
    ordinary.write_text(ORDINARY)
    (copy / "src/project/__init__.py").write_text("from project.ordinary import Gan\n")
    ruff = [sys.executable, "-m", "ruff"]
    for check in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([*ruff, *check], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_readme_of_a_copy_removes_is_the_example_and_no_more(copy: Path) -> None:
    removals = re.findall(r"^git (rm .+)$", (copy / "README.md").read_text(), re.MULTILINE)
    for removal in removals:
        git(copy, *removal.split())
    left = git(copy, "ls-files", "configs", "src").splitlines()
    assert {name for name in left if name.startswith("src")} == {
        f"src/project/{name}.py" for name in ("__init__", "data", "model")
    }
    texts = [(copy / name).read_text() for name in left if name.startswith("configs")]
    assert texts
    assert not [text for text in texts if "ImageData" in text or "ConvNet" in text]


def test_the_wheel_is_built_of_what_is_committed_and_holds_it_all(template: Path) -> None:
    (template / "src/savepoint/not_committed.py").write_text("NEW = True\n")
    done = call(template, "new", "cats", "../cats")
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(template.parent / "cats" / VENDORED) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    tracked = git(template, "ls-files", "src/savepoint").splitlines()
    ours = {name.removeprefix("src/") for name in tracked}
    packaging = {f"savepoint/{name}" for name in ("pyproject.toml", "LICENSE", "README.md")}
    assert held == ours - packaging
    assert git(template.parent / "cats", "status", "--porcelain", "--ignored") == ""
    assert git(template, "status", "--porcelain") == "?? src/savepoint/not_committed.py"
    assert not list((template / "src").rglob("*.egg-info"))


def test_a_copy_with_the_library_as_sources_has_all_of_it(template: Path) -> None:
    done = call(template, "new", "--library", "source", "cats", "../cats")
    assert done.returncode == 0, done.stderr
    copy = template.parent / "cats"
    copied = files(copy)
    library = {
        name: text for name, text in files(template).items() if name.startswith("src/savepoint/")
    }
    assert library.items() <= copied.items()
    assert copied["requirements.txt"].decode().endswith("\n-e ./src/savepoint\n-e .\n")
    assert not any(name.endswith(".whl") for name in copied)
    refused(call(copy, "new", "dogs", "../dogs"), "Not the template")
    refused(call(copy, "upgrade", "x.whl"), "names no wheel in vendor/")


def test_the_library_carries_the_license_of_the_template() -> None:
    assert (ROOT / "src/savepoint/LICENSE").read_text() == (ROOT / "LICENSE").read_text()


@pytest.mark.parametrize("known", [True, False])
def test_the_first_commit_is_the_users_or_the_projects_where_git_knows_no_user(
    committed: Path, tmp_path: Path, wheel: Path, known: bool
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text(
        "[user]\nname = Ada\nemail = ada@example.org\n" if known else "[commit]\ngpgSign = true\n"
    )
    unknown = {
        key: "" for key in ("EMAIL", "GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME") if key in os.environ
    }
    settings = {"GIT_CONFIG_GLOBAL": str(config), "GIT_CONFIG_NOSYSTEM": "1"} | unknown
    copy = make(committed, tmp_path / "cats", wheel, **settings)
    author = git(copy, "log", "--format=%an <%ae>")
    assert author == ("Ada <ada@example.org>" if known else "cats <cats@localhost>")


def test_a_copy_that_a_git_hook_makes_leaves_the_repository_of_the_hook_alone(
    committed: Path, tmp_path: Path, wheel: Path
) -> None:
    before = git(committed, "log", "--all", "--format=%H"), git(committed, "status", "--porcelain")
    called_by_git = {
        "GIT_DIR": str(committed / ".git"),
        "GIT_INDEX_FILE": str(committed / ".git/index"),
    }
    copy = make(committed, tmp_path / "cats", wheel, **called_by_git)
    assert (
        git(committed, "log", "--all", "--format=%H"),
        git(committed, "status", "--porcelain"),
    ) == before
    assert len(git(copy, "log", "--format=%H").splitlines()) == 1


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 5
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def crowded(committed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A template with neighbours."""
    folder = tmp_path_factory.mktemp("crowded")
    (folder / "full").mkdir()
    (folder / "full" / "mine").touch()
    (folder / "file").touch()
    (folder / "link").symlink_to(folder / "template")
    return Path(shutil.copytree(committed, folder / "template"))


@pytest.mark.parametrize(
    ("name", "destination", "said"),
    [
        ("", "../cats", "Not a project name: ''"),
        ("my cats", "../cats", "Not a project name: 'my cats'"),
        ("cats-", "../cats", "Not a project name: 'cats-'"),
        ("../cats", "../cats", "Not a project name"),
        ("kätzchen", "../cats", "Not a project name"),
        ("cats\n", "../cats", "Not a project name"),
        ("Scikit_Learn", "../cats", "a package that the project needs: Scikit_Learn"),
        ("savepoint", "../cats", "a package that the project needs"),
        ("savepoint.lightning", "../cats", "a package that the project needs"),
        ("cats", "", "No place for the copy"),
        ("cats", "../full", "Taken: ../full"),
        ("cats", "../file", "Taken: ../file"),
        ("cats", "..", "Taken: .."),
        ("cats", ".", "Inside the template: ."),
        ("cats", "outputs/cats", "Inside the template: outputs/cats"),
        ("cats", "../link/cats", "Inside the template: ../link/cats"),
        ("cats", "../no/cats", "No such directory"),
    ],
)
def test_a_bad_name_or_place_is_refused_and_leaves_nothing(
    crowded: Path, name: str, destination: str, said: str
) -> None:
    before = sorted(crowded.parent.rglob("*"))
    refused(call(crowded, "new", name, destination), said)
    assert sorted(crowded.parent.rglob("*")) == before


def test_an_empty_directory_is_a_place_for_a_copy(
    committed: Path, tmp_path: Path, wheel: Path
) -> None:
    (tmp_path / "cats").mkdir()
    assert (make(committed, tmp_path / "cats", wheel) / "train.py").exists()


def test_a_template_without_a_repository_of_its_own_is_refused(template: Path) -> None:
    shutil.rmtree(template / ".git")
    refused(call(template, "new", "cats", "../cats"), "Not a git repository")
    git(template.parent, "init", "--quiet")
    commit(template.parent)
    refused(call(template, "new", "cats", "../../cats"), "Not a git repository")
    git(template, "init", "--quiet")
    refused(call(template, "new", "cats", "../cats"), "Nothing is committed")
    assert not (template.parent / "cats").exists()


@pytest.mark.root
def test_a_repository_that_git_does_not_trust_is_refused_with_the_command_that_trusts_it(
    template: Path,
) -> None:
    for path in (template, *template.rglob("*")):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    said = (
        f"Another user's repository: {template}. Git does not trust it, since its hooks and "
        "settings are programs. If you trust it: git config --global"
    )
    refused(call(template, "new", "cats", "../cats"), said)


def test_a_machine_without_git_is_told_so(committed: Path) -> None:
    refused(
        call(committed, "new", "cats", "../cats", PATH=str(committed)), "No git on this machine"
    )


def test_a_copy_of_a_copy_is_refused(cats: Path) -> None:
    refused(
        call(cats, "new", "dogs", "../dogs"),
        f"Not the template: {cats}, where pyproject.toml names cats",
    )


def test_a_wheel_that_cannot_be_built_is_refused_and_leaves_nothing(template: Path) -> None:
    (template / "src/savepoint/pyproject.toml").write_text("no table\n")
    commit(template)
    refused(call(template, "new", "cats", "../cats"), "The library's wheel was not built: ")
    assert [path.name for path in template.parent.iterdir()] == ["template"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_copy_leaves_nothing(
    committed: Path, tmp_path: Path, wheel: Path, signum: signal.Signals
) -> None:
    slow_git = tmp_path / "bin" / "git"
    slow_git.parent.mkdir()
    slow_git.write_text(
        f'#!/bin/sh\ncase "$*" in *" commit "*) touch {slow_git.parent}/here; exec sleep {LONGER_SECS};; esac\n'
        f'exec {shutil.which("git")} "$@"\n'
    )
    slow_git.chmod(0o755)
    slow = environment(committed) | {"PATH": f"{slow_git.parent}:{os.environ['PATH']}"}
    command = ["savepoint.template", "new", "--wheel", str(wheel), "cats", str(tmp_path / "cats")]
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=committed, env=slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (slow_git.parent / "here").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    assert len(list(tmp_path.glob(".cats-*.tmp/cats/.git"))) == 1
    process.send_signal(signum)
    assert process.communicate(timeout=HANG_SECS) == ("", "")
    assert process.returncode == 128 + signum
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_a_copy_that_is_interrupted_while_the_wheel_is_built_leaves_nothing(
    committed: Path, tmp_path: Path
) -> None:
    slow_pip = tmp_path / "slow" / "pip.py"
    slow_pip.parent.mkdir()
    slow_pip.write_text(
        f"open({str(slow_pip.parent / 'here')!r}, 'w').close()\nimport time; time.sleep({LONGER_SECS})\n"
    )
    paths = f"{slow_pip.parent}:{environment(committed)['PYTHONPATH']}"
    process = subprocess.Popen(
        [sys.executable, "-m", "savepoint.template", "new", "cats", str(tmp_path / "cats")],
        cwd=committed, env=environment(committed) | {"PYTHONPATH": paths}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (slow_pip.parent / "here").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=HANG_SECS)[1] == ""
    assert process.returncode == 128 + signal.SIGTERM
    assert [path.name for path in tmp_path.iterdir()] == ["slow"]


def test_an_upgrade_puts_the_new_wheel_in_the_place_of_the_old_one(copy: Path, newer: Path) -> None:
    for _ in range(2):  # the second finds nothing left to do
        done = call(copy, "upgrade", str(newer))
        assert done.returncode == 0, done.stderr
        assert "-> 97.0.1: vendor/ and requirements.txt, not committed.\n" in done.stdout
        assert [path.name for path in (copy / "vendor").iterdir()] == [newer.name]
        text = (copy / "requirements.txt").read_text()
        assert text.count(".whl") == text.count(f"\n./vendor/{newer.name}\n") == 1
    changed = {line.split()[-1] for line in git(copy, "status", "--porcelain").splitlines()}
    assert changed == {VENDORED, "requirements.txt", f"vendor/{newer.name}"}
    assert call(copy, "upgrade", f"vendor/{newer.name}").returncode == 0
    assert (copy / "vendor" / newer.name).read_bytes() == newer.read_bytes()


def test_an_upgrade_says_whose_environment_gets_it_as_well(
    copy: Path, newer: Path, tmp_path: Path
) -> None:
    (copy / ".venv").symlink_to(tmp_path / "another" / ".venv")
    done = call(copy, "upgrade", str(newer))
    assert f"share .venv, {tmp_path}/another for one: they get it as well" in done.stdout


def other_distribution(folder: Path) -> Path:
    path = folder / "savepoint_lightning-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cats-1.0.dist-info/METADATA", "Name: cats\nVersion: 1.0\n\n")
    return path


def no_archive(folder: Path) -> Path:
    path = folder / "savepoint_lightning-1.0-py3-none-any.whl"
    path.write_text("no wheel")
    return path


NO_WHEELS: dict[str, Callable[[Path, Path], Path | str]] = {
    "No wheel was named": lambda folder, wheel: "",
    "it is one of cats": lambda folder, wheel: other_distribution(folder),
    "File is not a zip file": lambda folder, wheel: no_archive(folder),
    "No such file or directory": lambda folder, wheel: folder / "gone.whl",
    "its name says otherwise": lambda folder, wheel: shutil.copy(wheel, folder / "renamed.whl"),
}


@pytest.mark.parametrize("said", NO_WHEELS)
def test_what_is_no_wheel_of_the_library_is_refused_and_changes_nothing(
    copy: Path, tmp_path: Path, newer: Path, said: str
) -> None:
    refused(call(copy, "upgrade", "--", str(NO_WHEELS[said](tmp_path, newer))), said)
    assert git(copy, "status", "--porcelain") == ""


def test_an_upgrade_of_the_template_itself_is_refused(committed: Path, newer: Path) -> None:
    refused(call(committed, "upgrade", str(newer)), "in the template")
    assert git(committed, "status", "--porcelain") == ""


def start(copy: Path, library: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=copy, env=environment(copy, library), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> str:
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@pytest.fixture(scope="session")
def library(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(wheel, tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def trained(cats: Path, library: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A copy with another project in it that has run once, to be left as it is."""

    @cache
    def made(name: str) -> Path:
        copy = Path(shutil.copytree(cats, tmp_path_factory.mktemp(name) / "cats"))
        make_it_yours(copy, PROJECTS[name])
        end(start(copy, library, *TRAINING, "straight"))
        return copy

    return made


def stop_after_a_save(process: subprocess.Popen[str], run: Path, signum: signal.Signals) -> None:
    while not list((run / "checkpoints").glob("step-*.ckpt")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signum)
    said = process.communicate()[0]
    expected = -signum if signum == signal.SIGKILL else 128 + signum
    assert process.returncode == expected, said


@pytest.mark.parametrize(
    ("name", "score"),
    [
        pytest.param("waves", "best_accuracy", marks=pytest.mark.slow),
        pytest.param("gan", "best_loss", marks=pytest.mark.slow),
        pytest.param("letters", "best_loss", marks=pytest.mark.slow),
        pytest.param("sums", "best_loss", marks=pytest.mark.slow),
    ],
)
def test_another_model_and_other_data_train_are_killed_and_resume_exactly_in_a_copy(
    trained: Trained, library: Path, tmp_path: Path, name: str, score: str
) -> None:
    copy = Path(shutil.copytree(trained(name), tmp_path / "cats"))
    killed = start(copy, library, *TRAINING, "killed")
    stop_after_a_save(killed, copy / "outputs/killed", signal.SIGKILL)
    end(start(copy, library, "resume.py", "outputs/killed"))
    straight, resumed = (final_state(copy / "outputs" / one) for one in ("straight", "killed"))
    assert list(difference(straight, resumed)) == []
    assert rows(copy / "outputs/straight") == rows(copy / "outputs/killed")
    assert resumed[score] is not None
    assert "verifies" in end(start(copy, library, "-m", "savepoint", "verify", "outputs/killed"))
    assert git(copy, "status", "--porcelain") == "", "a run leaves nothing that git would see"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["waves", "gan", "letters"])
def test_the_tests_of_a_copy_pass_with_another_model_and_other_data(
    copy: Path, library: Path, name: str
) -> None:
    make_it_yours(copy, PROJECTS[name])
    said = end(start(copy, library, "-m", "pytest", "-q"))
    assert "2 passed" in said
    assert git(copy, "status", "--porcelain") == ""


def test_the_tests_of_a_copy_pass_with_other_data_and_see_data_that_do_not_resume_exactly(
    copy: Path, library: Path
) -> None:
    project = PROJECTS["sums"]
    sums = project["data.py"][project["data.py"].index("class Sums") :]
    stock = sums.replace("class Sums", "class Stock").replace("resumable(", "(")
    both = {
        "data.py": f"{project['data.py']}\n\n{stock}",
        "__init__.py": project["__init__.py"].replace("Sums", "Stock, Sums"),
        "stock.yaml": project["mine.yaml"].replace("Sums", "Stock"),
    }
    make_it_yours(copy, project | both)
    tests = start(copy, library, "-m", "pytest", "-q")
    said = tests.communicate()[0]
    assert tests.returncode == 1, said
    assert "1 failed, 3 passed" in said
    assert re.findall(r"^FAILED .*\[(\S+)\]", said, re.MULTILINE) == ["stock.yaml"]
    assert git(copy, "status", "--porcelain") == ""


@pytest.mark.slow
def test_a_checkpoint_of_the_old_library_resumes_with_the_new_one(
    trained: Trained, library: Path, newer: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(trained("sums"), tmp_path / "cats"))
    stopped = start(copy, library, *TRAINING, "stopped")
    stop_after_a_save(stopped, copy / "outputs/stopped", signal.SIGTERM)
    assert call(copy, "upgrade", str(newer)).returncode == 0
    upgraded = unpacked(copy / "vendor" / newer.name, tmp_path / "upgraded")
    end(start(copy, upgraded, "resume.py", "outputs/stopped"))
    ends = [
        store.CheckpointStore(copy / "outputs" / one / "checkpoints").latest()
        for one in ("straight", "stopped")
    ]
    versions = [one.manifest["versions"]["savepoint"] for one in ends if one]
    assert versions == [savepoint.__version__, "97.0.1"]
    straight, resumed = (final_state(copy / "outputs" / one) for one in ("straight", "stopped"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops"):
        assert list(difference(straight[part], resumed[part])) == [], part
    assert rows(copy / "outputs/straight") == rows(copy / "outputs/stopped")


def make_environment(copy: Path) -> dict[str, str]:
    """One that has the packages of this one, and needs no network for what else is installed."""
    subprocess.run([sys.executable, "-m", "venv", copy / ".venv"], check=True)
    packages = Path(sysconfig.get_path("purelib"))
    own = copy / ".venv" / packages.relative_to(sys.prefix)
    for old in [*own.glob("setuptools*"), *own.glob("distutils*"), *own.glob("_distutils*")]:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    (own / "shared.pth").write_text(f"{packages}\n")
    (copy / ".venv/bin/ruff").symlink_to(Path(sys.prefix, "bin/ruff"))
    lacking = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # pip reads the second as what --no-build-isolation sets.
    return lacking | {
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "OMP_NUM_THREADS": "1",
        "UV": "",
    }


@pytest.mark.slow
@pytest.mark.parametrize("library", ["wheel", "source"])
def test_a_copy_sets_itself_up_is_linted_tested_and_upgraded(
    committed: Path, tmp_path: Path, newer: Path, library: str
) -> None:
    copy = tmp_path / "cats"
    done = call(committed, "new", "--library", library, "cats", str(copy))
    assert done.returncode == 0, done.stderr
    known = make_environment(copy)

    def run(*command: str) -> str:
        ended = subprocess.run(
            command, cwd=copy, env=known, capture_output=True, text=True, timeout=HANG_SECS
        )
        assert ended.returncode == 0, (command, ended.stdout[-3000:], ended.stderr[-3000:])
        return ended.stdout

    where = "import savepoint, project; print(savepoint.__file__, project.__file__, savepoint.__version__)"
    (copy / "src/project/ordinary.py").write_text(ORDINARY)
    run("make", "setup", "extras", "lint", "format", "lint")
    (copy / "src/project/ordinary.py").unlink()
    assert f"{copy}/src/project/__init__.py" in run(".venv/bin/python", "-c", where)
    assert " passed" in run("make", "test")
    little = "--epochs 1 --kills 1 --data.dataset digits"
    assert "identical, " in run("make", "prove", "CONFIG=configs/fast.yaml", f"ARGS={little}")
    if library == "wheel":
        run("make", "upgrade", f"WHEEL={newer}")
        assert run(".venv/bin/python", "-c", where).endswith(" 97.0.1\n")
    else:
        assert f"{copy}/src/savepoint/__init__.py" in run(".venv/bin/python", "-c", where)
    run("make", "clean")
    git(copy, "checkout", "--quiet", ".")
    assert [
        line for line in git(copy, "status", "--porcelain").splitlines() if newer.name not in line
    ] == []

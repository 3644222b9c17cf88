"""A copy of the template: what is in it, how it follows the template, and that another project
trains in it.

The template of these tests is the working tree, committed to a repository of its own.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from support.copies import call, commit, committed, files, git  # noqa: F401  (committed is a fixture)
from support.programs import ROOT
from support.small import difference, final_state, rows

NEXT = "  cd {}\n  make train\n  make test\n"


def replace(path: Path, old: str, new: str) -> None:
    assert path.read_text().count(old) == 1, f"{old!r} in {path}"
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture
def template(committed: Path, tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(committed, tmp_path / "template"))


def make(template: Path, destination: Path, **environment: str) -> Path:
    done = call(template, "new", "cats", str(destination), **environment)
    assert done.returncode == 0, done.stderr
    return destination


class Moved(NamedTuple):
    """A template that has moved on since it was copied: read it, don't change it."""

    template: Path
    copy: Path
    newest: str


def move_on(template: Path) -> str:
    """A new version of the template: changed, new, gone and renamed files, of which some are not
    for copies.
    """
    version = tomllib.loads((template / "pyproject.toml").read_text())["project"]["version"]
    replace(template / "pyproject.toml", f'version = "{version}"', 'version = "9.0"')
    replace(
        template / "pyproject.toml",
        "\ndependencies = [\n",
        '\ndependencies = [\n    "needed-now",\n',
    )
    replace(template / "Makefile", "## this list", "## this very list")
    replace(template / "README.md", "# Savepoint\n", "# Savepoint, the manual\n")
    (template / "src/savepoint/schedules.py").unlink()
    (template / "src/savepoint/brand_new.py").write_text("NEW = True\n")
    (template / "src/project/figures.py").write_text("CHANGED = True\n")
    (template / "tests/test_of_the_example.py").write_text("import project\n")
    (template / "notes").mkdir()
    (template / "notes/of_the_template.md").write_text("what a copy has no use for\n")
    replace(template / "src/savepoint/template.toml", "stays = [", 'stays = [ "notes/",')
    return commit(template)


@pytest.fixture(scope="module")
def moved(committed: Path, tmp_path_factory: pytest.TempPathFactory) -> Moved:
    folder = tmp_path_factory.mktemp("moved")
    template = Path(shutil.copytree(committed, folder / "template"))
    copy = make(template, folder / "cats")
    call(copy, "--help")
    return Moved(template, copy, move_on(template))


@pytest.fixture
def copy(moved: Moved, tmp_path: Path) -> Path:
    """A copy of the template as it was, to change."""
    return Path(shutil.copytree(moved.copy, tmp_path / "cats"))


def test_a_copy_is_what_is_committed_under_a_name_of_its_own(template: Path) -> None:
    original = files(template)
    (template / "train.py").write_text("not committed")
    done = call(template, "new", "black-cats", "../somewhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(NEXT.format("../somewhere"))
    assert "Not copied: what is not committed (1 in git status).\n" in done.stdout
    copy = template.parent / "somewhere"
    copied = files(copy)
    for name in (
        "train.py",
        "Makefile",
        "requirements.txt",
        "src/project/model.py",
        "src/savepoint/run.py",
    ):
        assert copied[name] == original[name], name
    assert copied["src/savepoint/README.md"] == original["README.md"]
    assert copied["src/savepoint/LICENSE"] == original["LICENSE"]
    assert copied["README.md"].decode().startswith("# black-cats\n")
    assert os.access(copy / ".ci/run", os.X_OK)
    project = tomllib.loads(copied["pyproject.toml"].decode())["project"]
    of_template = tomllib.loads(original["pyproject.toml"].decode())["project"]
    assert (project["name"], project["version"]) == ("black-cats", "0.1.0")
    assert {"license", "authors"} & project.keys() == set()
    assert {key for key in project if project[key] != of_template[key]} <= {
        "name",
        "version",
        "description",
    }
    assert json.loads(copied[".template.json"]) == {
        "source": str(template), "commit": git(template, "rev-parse", "HEAD"), "name": "black-cats",
        "version": of_template["version"],
    }  # fmt: skip
    name = [
        sys.executable,
        "-c",
        "from savepoint.run import default_name; print(default_name('mnist'))",
    ]
    at_copy = os.environ | {"PYTHONPATH": str(copy / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    made = subprocess.run(name, env=at_copy, capture_output=True, text=True)
    assert re.fullmatch(r"black-cats-mnist-\d{8}-\d{6}\n", made.stdout)
    assert git(copy, "status", "--porcelain", "--ignored") == ""
    assert git(
        copy, "log", "--format=%s %D"
    ) == f"black-cats, from Savepoint {of_template['version']} " + (
        f"({git(template, 'rev-parse', 'HEAD')[:7]}) HEAD -> main"
    )
    assert sorted(path.name for path in template.parent.iterdir()) == ["somewhere", "template"]


def test_what_belongs_to_the_template_alone_stays_there(committed: Path, copy: Path) -> None:
    rules = tomllib.loads((committed / "src/savepoint/template.toml").read_text())
    tracked, copied = set(git(committed, "ls-files").splitlines()), set(files(copy))
    assert set(rules["goes"]) | set(rules["moves"]) <= tracked, (
        "template.toml names what is not there"
    )
    for name in rules["stays"]:
        assert any(
            path == name or (name.endswith("/") and path.startswith(name)) for path in tracked
        ), f"no {name}"
    stayed = {path for path in tracked if path.startswith(tuple(rules["stays"]))} - set(
        rules["goes"]
    )
    own = {".template.json", "README.md", *rules["moves"].values()}
    assert copied == tracked - stayed - set(rules["moves"]) | own
    programs = re.findall(r"benchmarks/\w+\.py", (copy / "Makefile").read_text())
    assert set(programs) <= copied, (
        "the Makefile of a copy calls what stayed: let it go along, in template.toml"
    )


def test_the_tests_of_a_copy_need_nothing_of_the_example(copy: Path) -> None:
    tests = {path.stem: path.read_text() for path in (copy / "tests").glob("*.py")}
    missing = {"project"} | {path.stem for path in (ROOT / "tests").glob("*.py")} - set(tests)
    imported = {
        name: set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
        for name, text in tests.items()
    }
    assert {
        name for name, text in tests.items() if imported[name] & missing or "configs/" in text
    } == set()
    assert "test_exact_resume" in tests


@pytest.mark.parametrize("known", [True, False])
def test_the_first_commit_is_the_users_or_the_projects_where_git_knows_no_user(
    committed: Path, tmp_path: Path, known: bool
) -> None:
    config = tmp_path / "gitconfig"
    config.write_text(
        "[user]\nname = Ada\nemail = ada@example.org\n" if known else "[commit]\ngpgSign = true\n"
    )
    unknown = {
        key: "" for key in ("EMAIL", "GIT_AUTHOR_NAME", "GIT_COMMITTER_NAME") if key in os.environ
    }
    copy = make(
        committed,
        tmp_path / "cats",
        GIT_CONFIG_GLOBAL=str(config),
        GIT_CONFIG_NOSYSTEM="1",
        **unknown,
    )
    author = git(copy, "log", "--format=%an <%ae>")
    assert author == ("Ada <ada@example.org>" if known else "cats <cats@localhost>")


def test_a_copy_that_a_git_hook_makes_leaves_the_repository_of_the_hook_alone(
    committed: Path, tmp_path: Path
) -> None:
    before = git(committed, "log", "--all", "--format=%H"), git(committed, "status", "--porcelain")
    called_by_git = {
        "GIT_DIR": str(committed / ".git"),
        "GIT_INDEX_FILE": str(committed / ".git/index"),
    }
    copy = make(committed, tmp_path / "cats", **called_by_git)
    assert (
        git(committed, "log", "--all", "--format=%H"),
        git(committed, "status", "--porcelain"),
    ) == before
    assert len(git(copy, "log", "--format=%H").splitlines()) == 1


@pytest.mark.parametrize(
    ("origin", "source"),
    [
        ("https://ada:secret@example.org/t.git", "https://example.org/t.git"),
        ("git@example.org:t.git", "git@example.org:t.git"),
        ("../elsewhere", None),
    ],
)
def test_the_stamp_names_the_origin_that_has_the_commit_and_no_password(
    template: Path, origin: str, source: str | None
) -> None:
    git(template, "remote", "add", "origin", origin)
    git(template, "update-ref", "refs/remotes/origin/main", "HEAD")
    copies = [make(template, template.parent / "cats")]
    (template / "train.py").write_text("print('not pushed')\n")
    commit(template)
    copies += [make(template, template.parent / "more-cats")]
    cats, more = (json.loads((copy / ".template.json").read_text()) for copy in copies)
    assert cats["source"] == (source or str(template))
    assert more["source"] == str(template)


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


def test_an_empty_directory_is_a_place_for_a_copy(committed: Path, tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    assert (make(committed, tmp_path / "cats") / "train.py").exists()


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
    said = f"Another user's repository: {template}. Expected one that git trusts. If you trust it: git config --global"
    refused(call(template, "new", "cats", "../cats"), said)


def test_a_machine_without_git_is_told_so(committed: Path) -> None:
    refused(
        call(committed, "new", "cats", "../cats", PATH=str(committed)), "No git on this machine"
    )


def test_a_copy_of_a_copy_is_refused_and_names_the_template(moved: Moved) -> None:
    refused(call(moved.copy, "new", "dogs", "../dogs"), f"Run make new in {moved.template}")


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_copy_leaves_nothing(
    committed: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    slow_git = tmp_path / "bin" / "git"
    slow_git.parent.mkdir()
    slow_git.write_text(
        f'#!/bin/sh\ncase "$*" in *" commit "*) touch {slow_git.parent}/here; exec sleep 60;; esac\n'
        f'exec {shutil.which("git")} "$@"\n'
    )
    slow_git.chmod(0o755)
    environment = {
        "PYTHONPATH": str(committed / "src"),
        "PATH": f"{slow_git.parent}:{os.environ['PATH']}",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "savepoint.template", "new", "cats", str(tmp_path / "cats")],
        cwd=committed, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (slow_git.parent / "here").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    assert len(list(tmp_path.glob(".cats-*.tmp/cats/.git"))) == 1
    process.send_signal(signum)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 128 + signum
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


def test_an_update_merges_the_template_into_a_copy_that_was_edited(
    moved: Moved, copy: Path
) -> None:
    first = git(copy, "rev-parse", "HEAD")
    (copy / "src/project/model.py").write_text("MINE = True\n")
    (copy / "src/project/sources.py").unlink()
    (copy / "README.md").write_text("# My cats\n")
    replace(copy / "Makefile", "## remove caches", "## remove all caches")
    replace(copy / "pyproject.toml", 'version = "0.1.0"', 'version = "0.1.1"')
    mine = commit(copy)
    (copy / "notes.txt").write_text("not tracked")

    done = call(copy, "update")
    assert done.returncode == 0, done.stdout + done.stderr
    assert git(copy, "rev-parse", "HEAD") == mine, "the commit is the user's"
    assert git(copy, "status", "--porcelain").splitlines() == [
        "M  .template.json", "M  Makefile", "M  pyproject.toml", "M  src/project/figures.py", "M  src/savepoint/README.md",
        "A  src/savepoint/brand_new.py", "D  src/savepoint/schedules.py", "?? notes.txt",
    ]  # fmt: skip
    makefile = (copy / "Makefile").read_text()
    assert "## this very list" in makefile
    assert "## remove all caches" in makefile
    project = tomllib.loads((copy / "pyproject.toml").read_text())["project"]
    assert (project["name"], project["version"]) == ("cats", "0.1.1")
    assert "needed-now" in project["dependencies"]
    assert (copy / "src/project/model.py").read_text() == "MINE = True\n"
    assert (copy / "README.md").read_text() == "# My cats\n"
    stamp = json.loads((copy / ".template.json").read_text())
    assert (stamp["commit"], stamp["version"]) == (moved.newest, "9.0")
    commit(copy)
    again = call(copy, "update")
    assert again.returncode == 0
    assert (
        again.stdout
        == f"Nothing new: the template is at 9.0 ({moved.newest[:7]}), as this copy is.\n"
    )
    assert len(git(copy, "log", "--format=%H", f"{first}..").splitlines()) == 2, (
        "the template's history stays there"
    )


def test_what_both_changed_is_a_git_conflict_and_the_rest_is_merged(
    moved: Moved, copy: Path
) -> None:
    (copy / "src/project/figures.py").unlink()
    replace(copy / "Makefile", "## this list", "## my list")
    mine = commit(copy)
    done = call(copy, "update")
    assert done.returncode == 1, done.stderr
    assert "Conflicts: Makefile, src/project/figures.py\n" in done.stdout
    status = git(copy, "status", "--porcelain").splitlines()
    assert {"UU Makefile", "DU src/project/figures.py", "A  src/savepoint/brand_new.py"} <= set(
        status
    )
    assert re.search(
        rf"<<<<<<< HEAD\n.*## my list\n=======\n.*## this very list\n>>>>>>> .*Savepoint 9\.0 \({moved.newest[:7]}\)",
        (copy / "Makefile").read_text(),
    )
    assert json.loads((copy / ".template.json").read_text())["commit"] == moved.newest
    git(copy, "reset", "--quiet", "--hard")
    assert git(copy, "status", "--porcelain") == ""
    assert git(copy, "rev-parse", "HEAD") == mine
    assert json.loads((copy / ".template.json").read_text())["commit"] != moved.newest


def test_a_diff_shows_what_an_update_would_bring_and_touches_nothing(copy: Path) -> None:
    (copy / "Makefile").write_text("mine")
    before = files(copy), git(copy, "status", "--porcelain")
    done = call(copy, "diff")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^diff --git a/(\S+)", done.stdout, re.MULTILINE) == [
        "Makefile", "pyproject.toml", "src/project/figures.py", "src/savepoint/README.md", "src/savepoint/brand_new.py",
        "src/savepoint/schedules.py",
    ]  # fmt: skip
    assert (files(copy), git(copy, "status", "--porcelain")) == before


def test_a_template_that_stands_before_the_copy_has_nothing_new(template: Path) -> None:
    old = git(template, "rev-parse", "HEAD")
    newest = move_on(template)
    copy = make(template, template.parent / "cats")
    git(template, "checkout", "--quiet", old)
    update, diff = call(copy, "update"), call(copy, "diff")
    assert (update.returncode, diff.returncode) == (0, 0)
    assert "Nothing new" in update.stdout
    assert diff.stdout.count("\n") == 1
    assert json.loads((copy / ".template.json").read_text())["commit"] == newest


def edit_stamp(copy: Path, **values: str) -> None:
    stamp = json.loads((copy / ".template.json").read_text()) | values
    (copy / ".template.json").write_text(json.dumps(stamp))
    commit(copy)


def in_the_way(copy: Path) -> None:
    (copy / "src/savepoint/brand_new.py").write_text("mine, not tracked")


REFUSALS: dict[str, Callable[[Path], object]] = {
    "Uncommitted changes": lambda copy: (copy / "Makefile").write_text("mine"),
    "Not a copy of the template": lambda copy: ((copy / ".template.json").unlink(), commit(copy)),
    "Damaged": lambda copy: ((copy / ".template.json").write_text("{}"), commit(copy)),
    "Expected a whole commit id": lambda copy: edit_stamp(copy, commit="--help"),
    "Cannot read the template: /gone": lambda copy: edit_stamp(copy, source="/gone"),
    "Not in the template: 000000000000": lambda copy: edit_stamp(copy, commit="0" * 40),
    "Not updated: src/savepoint/brand_new.py": in_the_way,
    "Not a git repository": lambda copy: shutil.rmtree(copy / ".git"),
}


@pytest.mark.parametrize("said", REFUSALS)
def test_an_update_that_cannot_be_is_refused_and_changes_nothing(copy: Path, said: str) -> None:
    REFUSALS[said](copy)
    before = files(copy)
    refused(call(copy, "update"), said)
    assert files(copy) == before


def test_an_update_does_not_take_the_place_of_a_file_that_git_ignores(copy: Path) -> None:
    (copy / ".gitignore").write_text("src/savepoint/brand_new.py\n")
    commit(copy)
    (copy / "src/savepoint/brand_new.py").write_text("precious")
    done = call(copy, "update")
    assert done.returncode == 2, done.stdout
    assert "Not updated: src/savepoint/brand_new.py. " in done.stderr
    assert (copy / "src/savepoint/brand_new.py").read_text() == "precious"
    assert git(copy, "status", "--porcelain") == ""


def test_a_source_that_is_no_template_is_refused(template: Path) -> None:
    copy = make(template, template.parent / "cats")
    git(template, "rm", "--quiet", "src/savepoint/template.toml")
    commit(template)
    refused(call(copy, "update"), "Not a template")
    assert git(copy, "status", "--porcelain") == ""


WAVES = {
    "model.py": """
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics.classification import MulticlassAccuracy


class WaveClassifier(LightningModule):
    def __init__(self, width: int = 8, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv1d(2, width, 5), nn.BatchNorm1d(width), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(36 * width, 4)
        )
        self.accuracy = MulticlassAccuracy(4)
        self.example_input_array = torch.linspace(-1, 1, 160).view(2, 2, 40)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("val/accuracy", self.accuracy)

    def test_step(self, batch, batch_idx):
        self.accuracy(self(batch[0]), batch[1])
        self.log("test/accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)
""",
    "data.py": """
import torch
from lightning.pytorch import LightningDataModule

from savepoint.loader import Batches


class Waves(LightningDataModule):
    name, fingerprint = "waves", "1"

    def __init__(self, batch_size: int = 16) -> None:
        super().__init__()
        self.batch_size = batch_size
        generator = torch.Generator().manual_seed(0)
        self.y = torch.randint(0, 4, (600,), generator=generator)
        time = torch.linspace(0, 6, 40) * (1 + self.y[:, None])
        self.x = torch.stack([time.sin(), time.cos()], 1) + torch.randn(600, 2, 40, generator=generator)

    def part(self, begin, end, shuffle=False):
        return Batches(self.x[begin:end], self.y[begin:end], batch_size=self.batch_size, seed=1, shuffle=shuffle)

    def train_dataloader(self):
        return self.part(0, 400, shuffle=True)

    def val_dataloader(self):
        return self.part(400, 500)

    def test_dataloader(self):
        return self.part(500, 600)
""",
    "__init__.py": "from project.data import Waves\nfrom project.model import WaveClassifier\n",
    "mine.yaml": """
model: {class_path: WaveClassifier}
data: {class_path: Waves}
trainer: {max_epochs: 8, log_every_n_steps: 5}
""",
}


def sums() -> dict[str, str]:
    """The regression of CONTRIBUTING.md: its four edits."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, config = (
        re.search(rf"```{kind}\n(.*?)```", text, re.DOTALL) for kind in ("python", "yaml")
    )
    assert code
    assert config
    model, data = re.split(r"\n(?=class Sums)", code[1])
    imports = (
        "import torch\nimport torch.nn.functional as F\nfrom lightning.pytorch import "
        "LightningDataModule, LightningModule\n"
        "from torch import nn\nfrom torch.utils.data import DataLoader, TensorDataset\nfrom "
        "savepoint.loader import resumable\n"
    )
    names = "from project.data import Sums\nfrom project.model import Regression\n"
    return {
        "model.py": imports + model,
        "data.py": imports + data,
        "__init__.py": names,
        "mine.yaml": config[1],
    }


def make_it_yours(copy: Path, project: dict[str, str]) -> None:
    for path in (copy / "src/project", copy / "configs"):
        shutil.rmtree(path)
        path.mkdir()
    for name, text in project.items():
        (copy / ("configs" if name.endswith(".yaml") else "src/project") / name).write_text(text)
    commit(copy)


def start(copy: Path, *command: str) -> subprocess.Popen[str]:
    environment = {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=copy, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def end(process: subprocess.Popen[str]) -> str:
    said = process.communicate()[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.parametrize(
    ("project", "score"),
    [
        pytest.param(WAVES, "best_accuracy", marks=pytest.mark.slow, id="waves"),
        pytest.param(sums(), "best_loss", id="sums"),
    ],
)
def test_another_model_and_other_data_train_are_killed_and_resume_exactly_in_a_copy(
    copy: Path, project: dict[str, str], score: str
) -> None:
    make_it_yours(copy, project)
    command = [
        "train.py",
        "--config",
        "configs/mine.yaml",
        "--checkpoint.save_every_steps",
        "5",
        "--run_name",
    ]
    end(start(copy, *command, "straight"))
    killed = start(copy, *command, "killed")
    while not list((copy / "outputs/killed/checkpoints").glob("step-*.ckpt")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.01)
    killed.kill()
    said = killed.communicate()[0]
    assert killed.returncode == -signal.SIGKILL, said
    end(start(copy, "resume.py", "outputs/killed"))
    straight, resumed = (final_state(copy / "outputs" / name) for name in ("straight", "killed"))
    assert list(difference(straight, resumed)) == []
    assert rows(copy / "outputs/straight") == rows(copy / "outputs/killed")
    assert resumed[score] is not None
    assert "verifies" in end(start(copy, "-m", "savepoint", "verify", "outputs/killed"))
    end(start(copy, "-m", "savepoint", "export", "outputs/killed", "--format", "safetensors"))
    assert git(copy, "status", "--porcelain") == "", "a run leaves nothing that git would see"


@pytest.mark.slow
def test_the_tests_that_went_along_pass_in_a_copy_without_the_example(copy: Path) -> None:
    make_it_yours(copy, WAVES)
    end(start(copy, "-m", "pytest", "-q", "-n", "2"))

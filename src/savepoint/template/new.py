"""`make new`: the start of a project. A copy of the last commit: the example, and the library as a
wheel (or, to change it, as its sources) in a git repository with one commit.
"""

import os
import re
import shlex
import shutil
import tarfile
import tempfile
import tomllib
from pathlib import Path

from savepoint import workspace
from savepoint.entry import saying
from savepoint.errors import ConfigError
from savepoint.template import wheel as wheels
from savepoint.template.git import check_repository, git, identity

COPIED = (
    "train.py", "resume.py", "Makefile", "requirements.txt", "pyproject.toml", "configs",
    "src/project", "tests/test_project.py", ".gitignore", ".pre-commit-config.yaml", "Dockerfile",
    ".dockerignore", ".ci/run", ".ci/environment.py", ".github/workflows/ci.yml",
)  # fmt: skip
LEFT_OUT = (
    "src/project/text.py", "configs/text.yaml", "src/project/flower.py",
    "configs/federated/digits.yaml", "configs/federated/fashion.yaml",
    "configs/federated/mnist.yaml", "configs/federated/personal.yaml",
    "configs/checkpoint/mirror.yaml", "src/project/sharded.py", "configs/sharded.yaml",
    "configs/cluster/torchrun.sh", "configs/cluster/slurm.sh", "configs/cluster/spot.sh",
)  # fmt: skip
"""The second example, Flower's app with its configs, the preset of a mirror, which names a bucket,
the model that is spread over processes, and the scripts for clusters: a copy has one example to
replace.
"""
FLOWER = r"(?s)# `flwr run \.`.*?(?=\[tool\.ruff\])"
"""The tables of pyproject.toml that Flower's app has."""
LIBRARY = "src/savepoint"
UNTYPED = "ignore_errors = true # without this line, what you annotate is checked"
"""Lightning's own types call much of what is written for it wrong: `self.hparams.lr`, a hook's
arguments.
"""
UNFORMATTED = 'exclude = ["src/project/*"] # yours: make format lays it out all the same'
SOURCE_LINE = f"-e ./{LIBRARY}"
"""The line of the sources in requirements.txt."""


def new(name: str, destination: str, *, library: str = "wheel", wheel: Path | None = None) -> int:
    """Makes a copy of HEAD in `destination`.

    Args:
        library: `wheel` or `source`.
        wheel: A built one; without it the wheel is built from the commit.
    """
    root = workspace.project().root.resolve()
    check_name(name, root)
    check_template(root)
    check_repository(root)
    dest = check_destination(destination, root)
    if wheel is not None:
        wheels.version(wheel)
    if changes := git("status", "--porcelain", at=root).splitlines():
        print(f"Not copied: what is not committed ({len(changes)} in git status).", flush=True)
    commit = git("rev-parse", "HEAD", at=root)
    hidden = f".{dest.name}-"
    with (
        saying("Copying the template, building its library ..."),
        tempfile.TemporaryDirectory(prefix=hidden, suffix=".tmp", dir=dest.parent) as beside,
    ):
        copy = Path(beside, dest.name)
        write_files(root, commit, name, copy)
        what = write_library(root, commit, copy, library, wheel)
        first_commit(copy, name, f"{name}, from Savepoint ({commit[:7]})")
        # A crash before this leaves no DEST: the unfinished one beside it is hidden.
        os.rename(copy, dest)
    print(f"{name}: {dest}, a git repository with one commit; the library is {what}. Next:")
    print(f"  cd {shlex.quote(os.path.expanduser(destination))}\n  make train\n  make test")
    return 0


def write_files(root: Path, commit: str, name: str, copy: Path) -> None:
    extract(root, commit, (*COPIED, *(f":(exclude){name}" for name in LEFT_OUT)), copy)
    pyproject = copy / "pyproject.toml"
    pyproject.write_text(renamed(pyproject.read_text(), name))
    readme = Path(__file__).with_name("README.md").read_text()
    (copy / "README.md").write_text(readme.replace("NAME", name))


def write_library(root: Path, commit: str, copy: Path, library: str, wheel: Path | None) -> str:
    """Returns the place of the library in the copy."""
    if library == "source":
        extract(root, commit, (LIBRARY,), copy)
        return f"{LIBRARY}, its sources"
    folder = copy / wheels.FOLDER
    folder.mkdir()
    if wheel is None:
        source = copy.parent / "source"
        extract(root, commit, (LIBRARY,), source)
        wheel = wheels.build(source / LIBRARY, folder)
    else:
        shutil.copy(wheel, folder)
    requirements = copy / "requirements.txt"
    text = requirements.read_text()
    if text.splitlines().count(SOURCE_LINE) != 1:
        raise ConfigError(
            f"No line for the library in {root / 'requirements.txt'} at {commit[:7]}. The line of "
            f"the wheel replaces {SOURCE_LINE!r}. Put it back and commit."
        )
    requirements.write_text(text.replace(SOURCE_LINE, wheels.line(wheel)))
    return f"{wheels.FOLDER}/{wheel.name}"


def extract(root: Path, commit: str, names: tuple[str, ...], into: Path) -> None:
    """Writes files of a commit under their own paths."""
    into.parent.mkdir(exist_ok=True)
    archive = into.with_name(f"{into.name}.tar")
    git("archive", "--output", str(archive), commit, "--", *names, at=root)
    with tarfile.open(archive) as tar:
        # Python 3.11.0 has no filter yet; git has just written this archive.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        tar.extractall(into)


def first_commit(copy: Path, name: str, message: str) -> None:
    git("init", "--quiet", "--initial-branch=main", at=copy)
    git("add", "--all", "--force", at=copy)
    git(*identity(name, at=copy), "commit", "--quiet", "--message", message, at=copy)


def renamed(pyproject: str, name: str) -> str:
    """With the project's own metadata in place of the template's, and its code free of types and of
    a layout.
    """
    own = {
        "name": name,
        "version": "0.1.0",
        "description": f"{name}: a PyTorch Lightning project.",
    }
    for key in ("name", "version", "description", "license", "authors"):
        line = f'{key} = "{own[key]}"\n' if key in own else ""
        pyproject = re.sub(rf"^{key} = .*\n", line, pyproject, count=1, flags=re.MULTILINE)
    pyproject = re.sub(r"(?m)^exclude = \[\].*", UNFORMATTED, pyproject)
    pyproject = re.sub(FLOWER, "", pyproject)
    return re.sub(r"(?m)^ignore_errors = .*", UNTYPED, pyproject)


def check_name(name: str, root: Path) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", name, re.IGNORECASE | re.ASCII):
        raise ConfigError(
            f"Not a project name: {name!r}. Expected letters, digits, '-', '_' and '.', with a "
            "letter or digit at both ends, since it names a Python distribution. "
            "For example: make new NAME=cats DEST=../cats"
        )
    requirements = root / "requirements.txt"
    text = requirements.read_text() if requirements.is_file() else ""
    needed = re.findall(r"^\w[\w.-]*", text, re.MULTILINE)
    taken = [workspace.TEMPLATE, wheels.DISTRIBUTION, "savepoint", *needed]
    if plain(name) in map(plain, taken):
        raise ConfigError(
            f"The name of a package that the project needs: {name}. One environment holds both. "
            "Choose another NAME."
        )


def plain(name: str) -> str:
    """The name as an installer compares it."""
    return re.sub("[-_.]+", "-", name).lower()


def check_template(root: Path) -> None:
    """Raises ConfigError in a copy, which lacks files that another copy is made of."""
    path = root / "pyproject.toml"
    try:
        name = tomllib.loads(path.read_text())["project"]["name"]
    except (OSError, ValueError, KeyError, TypeError):
        name = "nothing"
    if name != workspace.TEMPLATE:
        raise ConfigError(
            f"Not the template: {root}, where pyproject.toml names {name}. A copy lacks files that "
            f"another is made of. Call make new in {workspace.TEMPLATE}: it has benchmarks/."
        )


def check_destination(given: str, root: Path) -> Path:
    dest = Path(given).expanduser().resolve()
    if not given:
        raise ConfigError(
            "No place for the copy, which is a repository in a new directory. "
            "For example: make new NAME=cats DEST=../cats"
        )
    if dest.is_relative_to(root):
        raise ConfigError(
            f"Inside the template: {given}. A copy is a repository of its own. Choose a DEST "
            f"outside {root}."
        )
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise ConfigError(
            f"Taken: {given}. A copy overwrites no file. Choose a new or an empty directory."
        )
    if not dest.parent.is_dir():
        raise ConfigError(
            f"No such directory: {dest.parent}. It is the place for {dest.name}, and a mistyped "
            f"path makes no folders. Make it first: mkdir -p {shlex.quote(str(dest.parent))}"
        )
    return dest

"""A project is a copy of the template that can still follow it. Needs git, and the standard library
only.

python -m savepoint.template new NAME DEST      make new NAME=cats DEST=../cats
python -m savepoint.template diff               make template-diff
python -m savepoint.template update             make template-update

What a copy is depends on a commit of the template and on the project's name alone: the commit's
files as its `template.toml` says, and NAME in pyproject.toml. `.template.json` holds which commit
that was. `update` makes a copy of that commit and one of the template's newest, and has git merge
the difference between the two into the project. The project's own README is no part of this: `new`
writes it once.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from savepoint.errors import ConfigError, SavepointError

ROOT = Path(__file__).resolve().parents[2]
STAMP, RULES = ".template.json", "src/savepoint/template.toml"

README = """\
# {name}

A PyTorch Lightning project whose runs survive, begun as a copy of Savepoint.

```bash
make train                                  # sets itself up in .venv, trains, tests, prints where everything is
make resume                                 # continues the newest run; CKPT=... another one
make test
make template-diff                          # what is new in the template; make template-update merges it
```

`src/project/` is what is trained, now an example: CONTRIBUTING.md shows the four edits that replace it. `src/savepoint/` is how
runs are started, saved and resumed. Its manual is `src/savepoint/README.md`; the figures and some of the tests that it names
stayed in the template. Its license, `src/savepoint/LICENSE`, covers what came from there; choose one for what is yours.
"""


@dataclass(frozen=True)
class Stamp:
    """The content of `.template.json`: where the copy is from (a path or a URL), and its name."""

    source: str
    commit: str
    version: str
    name: str

    def __str__(self) -> str:
        return f"{self.version} ({self.commit[:7]})"


def new(name: str, destination: str) -> int:
    """A copy of HEAD in `destination`, in a git repository of its own with one commit."""
    check_name(name)
    if (ROOT / STAMP).exists():
        raise ConfigError(
            f"A copy itself: {ROOT}. Expected the template. Run make new in {read_stamp().source}"
        )
    check_repository()
    dest = check_destination(destination)
    if changes := git("status", "--porcelain").splitlines():
        print(f"Not copied: what is not committed ({len(changes)} in git status).")
    commit = git("rev-parse", "HEAD")
    with tempfile.TemporaryDirectory(
        prefix=f".{dest.name}-", suffix=".tmp", dir=dest.parent
    ) as beside:
        copy = Path(beside, dest.name)
        stamp = build(ROOT, Stamp(published(commit), commit, "", name), copy)
        (copy / "README.md").write_text(README.format(name=name))
        git("init", "--quiet", "--initial-branch=main", at=copy)
        git("add", "--all", "--force", at=copy)
        git(
            *identity(name),
            "commit",
            "--quiet",
            "--message",
            f"{name}, from Savepoint {stamp}",
            at=copy,
        )
        # A crash before this line leaves no DEST; the unfinished one beside it is hidden.
        os.rename(copy, dest)
    print(f"{name}: a copy of Savepoint {stamp} in {dest}, a git repository with one commit. Next:")
    print(f"  cd {shlex.quote(os.path.expanduser(destination))}\n  make train\n  make test")
    return 0


def diff() -> int:
    with news() as (repository, stamp, newest):
        print(f"Savepoint {stamp} -> {newest}, {stamp.source}", flush=True)
        if newest != stamp:
            show = [
                "git",
                "--git-dir",
                str(repository),
                "diff",
                "HEAD~1",
                "HEAD",
                "--",
                ".",
                f":!{STAMP}",
            ]
            return subprocess.run(show, env=environment()).returncode
    return 0


def update() -> int:
    """Merges the template's changes into the working tree and the index; the commit is the user's."""
    read_stamp()
    check_repository()
    if git("status", "--porcelain", "--untracked-files=no"):
        raise ConfigError(
            f"Uncommitted changes: {ROOT}. Expected none, so that an update can be undone. Commit "
            "them."
        )
    with news() as (repository, stamp, newest):
        if newest == stamp:
            print(f"Nothing new: the template is at {stamp}, as this copy is.")
            return 0
        git("fetch", "--quiet", "--no-tags", str(repository), "HEAD")
        _refuse_in_the_way()
        # A crash in here leaves a part of the update in a tree that was clean: `git reset --hard`
        # takes it back.
        picked = ask("cherry-pick", "--no-commit", "FETCH_HEAD")
    conflicts = git("diff", "--name-only", "--diff-filter=U").splitlines()
    if picked.returncode and not conflicts:
        raise ConfigError(
            f"Not updated: {last_line(picked)}. Expected a tree that git can merge into. Look at: "
            "git status"
        )
    print(f"Savepoint {stamp} -> {newest}: merged, not committed. Take it back: git reset --hard")
    if conflicts:
        print(f"Conflicts: {', '.join(conflicts)}\nMend them, then: git commit --all")
        return 1
    print("Look at it: git diff --cached    Keep it: git commit")
    return 0


def _refuse_in_the_way() -> None:
    """Git would not overwrite a file that it does not know, but one that it was told to ignore."""
    new = git(
        "diff", "--no-renames", "--diff-filter=A", "--name-only", "-z", "FETCH_HEAD~1", "FETCH_HEAD"
    ).split("\0")
    known = set(git("ls-files", "-z").split("\0"))
    if in_the_way := [
        name for name in new if name and name not in known and os.path.lexists(ROOT / name)
    ]:
        raise ConfigError(
            f"Not updated: {', '.join(in_the_way)}. Expected no file that git does not know where "
            "the template has a new one. Move it away or commit it."
        )


@contextmanager
def news() -> Iterator[tuple[Path, Stamp, Stamp]]:
    """A repository of two commits, a copy of the stamp's commit and one of the template's newest;
    and their stamps.

    The stamps are the same where there is nothing new.
    """
    stamp = read_stamp()
    with tempfile.TemporaryDirectory(prefix="template-") as folder:
        source, copies = Path(folder, "source"), Path(folder, "copies")
        cloned = ask("clone", "--quiet", "--bare", "--", stamp.source, str(source))
        head = ask("rev-parse", "--verify", "HEAD", at=source) if cloned.returncode == 0 else cloned
        if head.returncode:
            raise ConfigError(
                f"Cannot read the template: {stamp.source} ({last_line(head)}). Expected a path or "
                f"URL that git can clone. Name another as `source` in {STAMP}."
            )
        if ask("cat-file", "-e", f"{stamp.commit}^{{commit}}", at=source).returncode:
            raise ConfigError(
                f"Not in the template: {stamp.commit[:12]}, which this is a copy of "
                f"({stamp.source}). Expected its whole history. Name a repository that has it as "
                f"`source` in {STAMP}."
            )
        newest = replace(stamp, commit=head.stdout.strip())
        if (
            ask("merge-base", "--is-ancestor", newest.commit, stamp.commit, at=source).returncode
            == 0
        ):
            yield copies, stamp, stamp
            return
        git("init", "--quiet", "--bare", str(copies))
        for number, each in enumerate((stamp, newest)):
            newest = build(source, each, Path(folder, str(number)))
            here = "--git-dir", str(copies), "--work-tree", str(Path(folder, str(number)))
            git(*here, "add", "--all", "--force", at=Path(folder))
            # What git shows at a conflict, and offers for the user's commit.
            message = f"Savepoint {newest}"
            git(*here, *NOBODY, "commit", "--quiet", "--message", message, at=Path(folder))
        yield copies, stamp, newest


def build(repository: Path, stamp: Stamp, directory: Path) -> Stamp:
    """Writes what a copy of `stamp.commit` is into a new directory. Returns the stamp with that
    commit's version.
    """
    archive = directory.with_name(f"{directory.name}.tar")
    git("archive", "--output", str(archive), stamp.commit, at=repository)
    with tarfile.open(archive) as tar:
        # Python 3.11.0 has none yet.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, _: member)
        found = tar.extractfile(RULES) if RULES in tar.getnames() else None
        if found is None:
            raise ConfigError(
                f"Not a template: {stamp.source} at {stamp.commit[:12]}. Expected a {RULES} in it. "
                "Name the commit and the repository that this is a copy of."
            )
        rules = tomllib.loads(found.read().decode())
        for member in tar:
            if not member.isdir() and (path := place(member.name, rules)):
                member.name = path
                tar.extract(member, directory)
    pyproject = directory / "pyproject.toml"
    text = pyproject.read_text()
    stamp = replace(stamp, version=tomllib.loads(text)["project"]["version"])
    pyproject.write_text(renamed(text, stamp.name))
    (directory / STAMP).write_text(json.dumps(asdict(stamp), indent=2) + "\n")
    return stamp


def place(path: str, rules: Mapping[str, Any]) -> str | None:
    """Of a file of the template in a copy; None if it is not copied."""
    stays = any(
        path.startswith(name) if name.endswith("/") else path == name for name in rules["stays"]
    )
    if stays and path not in rules["goes"]:
        return None
    return str(rules["moves"].get(path, path))


def renamed(pyproject: str, name: str) -> str:
    """With the project's own metadata: what the template says there about itself must never reach a
    project again.
    """
    own = {"name": name, "version": "0.1.0", "description": f"{name}: a PyTorch Lightning project."}
    for key in ("name", "version", "description", "license", "authors"):
        line = f'{key} = "{own[key]}"\n' if key in own else ""
        pyproject = re.sub(rf"^{key} = .*\n", line, pyproject, count=1, flags=re.MULTILINE)
    return pyproject


def read_stamp() -> Stamp:
    path = ROOT / STAMP
    try:
        content = json.loads(path.read_text())
        stamp = Stamp(**{field.name: str(content[field.name]) for field in fields(Stamp)})
    except FileNotFoundError:
        raise ConfigError(
            f"Not a copy of the template: {ROOT} has no {STAMP}. Expected one that make new made. "
            "In the template itself there is nothing to update."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Damaged: {path} ({error!r}). Expected what make new wrote. git checkout {STAMP}"
        ) from None
    if not re.fullmatch("[0-9a-f]{40,64}", stamp.commit):
        raise ConfigError(
            f"Damaged: {path}, commit {stamp.commit!r}. Expected a whole commit id. git checkout "
            f"{STAMP}"
        )
    return stamp


def check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?", name, re.IGNORECASE | re.ASCII):
        raise ConfigError(
            f"Not a project name: {name!r}. Expected letters, digits, '-', '_' and '.', with a "
            "letter or digit at both ends. For example: make new NAME=cats DEST=../cats"
        )
    needed = re.findall(r"^\w[\w.-]*", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    if plain(name) in map(plain, ["savepoint", *needed]):
        raise ConfigError(
            f"The name of a package that the project needs: {name}. Expected another. Choose a new "
            "NAME."
        )


def plain(name: str) -> str:
    """Two names that are the same for an installer become the same."""
    return re.sub("[-_.]+", "-", name).lower()


def check_destination(given: str) -> Path:
    dest = Path(given).expanduser().resolve()
    if not given:
        raise ConfigError(
            "No place for the copy. Expected a new directory. For example: make new NAME=cats "
            "DEST=../cats"
        )
    if dest.is_relative_to(ROOT):
        raise ConfigError(
            f"Inside the template: {given}. Expected a place outside {ROOT}. Choose another DEST."
        )
    if dest.exists() and not (dest.is_dir() and not any(dest.iterdir())):
        raise ConfigError(
            f"Taken: {given}. Expected a new or an empty directory. Choose another DEST."
        )
    if not dest.parent.is_dir():
        raise ConfigError(
            f"No such directory: {dest.parent}. Expected the place for {dest.name} in it. Make it "
            "first."
        )
    return dest


def check_repository() -> None:
    """The project's root has to be the root of a repository: a folder inside another one would be
    taken for that one.
    """
    top = ask("rev-parse", "--show-toplevel")
    if top.returncode or Path(top.stdout.strip()).resolve() != ROOT:
        if "safe.directory" in top.stderr:
            trust = shlex.join(["git", "config", "--global", "--add", "safe.directory", str(ROOT)])
            raise ConfigError(
                f"Another user's repository: {ROOT}. Expected one that git trusts. If you trust "
                f"it: {trust}"
            )
        reason = last_line(top) if top.returncode else f"it lies in that of {top.stdout.strip()}"
        raise ConfigError(
            f"Not a git repository: {ROOT} ({reason}). Expected one. Clone it with git."
        )
    if ask("rev-parse", "--verify", "HEAD").returncode:
        raise ConfigError(f"Nothing is committed: {ROOT}. Expected a commit. Commit first.")


def published(commit: str) -> str:
    """Where a copy will find the template: at its origin if that has the commit, without a
    password; else here.
    """
    if ask("branch", "--remotes", "--contains", commit, "--list", "origin/*").stdout.strip():
        url = git("remote", "get-url", "origin")
        parts = urlsplit(url)
        if parts.scheme in ("http", "https"):
            return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        if re.match(r"[^/]+:", url):  # ssh://host/path, or host:path
            return url
    return str(ROOT)


NOBODY = ("-c", "user.name=Savepoint", "-c", "user.email=template@savepoint.invalid")


def identity(name: str) -> Sequence[str]:
    """Options of git for a commit by the user, or by the project where git does not know who that
    is.
    """
    known = ask("-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT").returncode == 0
    return () if known else ("-c", f"user.name={name}", "-c", f"user.email={name}@localhost")


def git(*arguments: str, at: Path = ROOT) -> str:
    """What git says on stdout.

    Raises:
        ConfigError: With its last words.
    """
    done = ask(*arguments, at=at)
    if done.returncode:
        raise ConfigError(
            f"git failed: {last_line(done)} ({shlex.join(['git', *arguments])}). Expected git 2.28 "
            "or newer, and room."
        )
    return done.stdout.strip()


def ask(*arguments: str, at: Path = ROOT) -> subprocess.CompletedProcess[str]:
    # Hooks and signatures are for the user's own commits.
    settings = [
        "-c",
        "core.hooksPath=/dev/null",
        "-c",
        "commit.gpgSign=false",
        "-c",
        "merge.directoryRenames=false",
    ]
    try:
        return subprocess.run(
            ["git", *settings, *arguments],
            cwd=at,
            env=environment(),
            text=True,
            capture_output=True,
            check=False,
        )
    except FileNotFoundError:
        raise ConfigError(
            "No git on this machine. Expected git 2.28 or newer. Install it."
        ) from None


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def environment() -> dict[str, str]:
    """Without what git sets for its hooks: called from one, we would commit into the repository
    that runs it.
    """
    hook = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX")
    return {key: value for key, value in os.environ.items() if key not in hook}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="template", description="Copy the template, and follow it in a copy."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    arguments = commands.add_parser(
        "new", help="a copy of this template, as the start of a project"
    )
    arguments.add_argument("name")
    arguments.add_argument("destination")
    commands.add_parser(
        "diff", help="what changed in the template since this copy was made or updated"
    )
    commands.add_parser("update", help="merge that into this copy")
    asked = parser.parse_args(argv)
    # Leave as after an error: what is unfinished goes.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    try:
        if asked.command == "new":
            return new(asked.name, asked.destination)
        return diff() if asked.command == "diff" else update()
    except SavepointError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        where = error.filename2 or error.filename
        print(
            f"Cannot write: {where} ({error.strerror}). Expected room that this user may write to.",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())

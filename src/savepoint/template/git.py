"""Git for a project: called without its hooks; its failures are ConfigErrors."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from savepoint.errors import ConfigError

HOOK = (
    "GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_OBJECT_DIRECTORY", "GIT_PREFIX",
)  # fmt: skip
"""Variables that git sets for a hook: with them we would commit into the hook's repository."""


def git(*arguments: str, at: Path) -> str:
    """The output of git.

    Raises:
        ConfigError: git failed; with the last line of its errors.
    """
    done = ask(*arguments, at=at)
    if done.returncode:
        command = shlex.join(["git", *arguments])
        raise ConfigError(
            f"git failed: {last_line(done)} ({command}). A copy needs git 2.28 or newer, and room "
            "for a repository. Call the command by hand to see more."
        )
    return done.stdout.strip()


def ask(*arguments: str, at: Path) -> subprocess.CompletedProcess[str]:
    # Hooks and signatures are for the user's own commits.
    settings = ["-c", "core.hooksPath=/dev/null", "-c", "commit.gpgSign=false"]
    environment = {key: value for key, value in os.environ.items() if key not in HOOK}
    try:
        return subprocess.run(
            ["git", *settings, *arguments],
            cwd=at, env=environment, text=True, capture_output=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        raise ConfigError(
            "No git on this machine. A copy is a repository of git 2.28 or newer. Install it with "
            "the system's packages."
        ) from None


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def identity(name: str, *, at: Path) -> Sequence[str]:
    """Options for a commit by the user, or by the project where git has no name of the user."""
    asked = ask("-c", "user.useConfigOnly=true", "var", "GIT_COMMITTER_IDENT", at=at)
    if asked.returncode == 0:
        return ()
    return ("-c", f"user.name={name}", "-c", f"user.email={name}@localhost")


def check_repository(root: Path) -> None:
    """Raises ConfigError where `root` is not the root of a repository with a commit."""
    top = ask("rev-parse", "--show-toplevel", at=root)
    if "safe.directory" in top.stderr:
        trust = ["git", "config", "--global", "--add", "safe.directory", str(root)]
        raise ConfigError(
            f"Another user's repository: {root}. Git does not trust it, since its hooks and "
            f"settings are programs. If you trust it: {shlex.join(trust)}"
        )
    if top.returncode or Path(top.stdout.strip()).resolve() != root.resolve():
        reason = last_line(top) if top.returncode else f"it lies in that of {top.stdout.strip()}"
        raise ConfigError(
            f"Not a git repository: {root} ({reason}). A copy is made of the last commit. Clone "
            "the template with git."
        )
    if ask("rev-parse", "--verify", "HEAD", at=root).returncode:
        raise ConfigError(
            f"Nothing is committed: {root}. A copy is made of the last commit. "
            "Commit first: git add --all && git commit"
        )

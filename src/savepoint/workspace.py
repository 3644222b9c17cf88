"""The project of this process: its directory and its default config, set once by the entry."""

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

TEMPLATE = "savepoint-template"
"""The name in the template's own pyproject.toml."""


@dataclass(frozen=True)
class Project:
    """A directory with train.py, resume.py and configs/.

    Attributes:
        default_config: The config of a run that names none, relative to `root`.
    """

    root: Path
    default_config: Path = Path()

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    @cached_property
    def name(self) -> str:
        """The name in pyproject.toml; empty in the template, and without that file."""
        try:
            content = tomllib.loads((self.root / "pyproject.toml").read_text())
            name = str(content["project"]["name"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return "" if name == TEMPLATE else name


_entered: Project | None = None


def enter(project: Project) -> None:
    """Only the entry calls this, and before anything else."""
    global _entered
    _entered = project


def project() -> Project:
    """The project of the entry; without one, as in `python -m savepoint`, the nearest directory
    upwards that has a resume.py.
    """
    if _entered is not None:
        return _entered
    here = Path.cwd()
    upwards = (path for path in (here, *here.parents) if (path / "resume.py").is_file())
    return Project(next(upwards, here))

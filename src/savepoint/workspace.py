"""The project that this process works for: where it lies, what it trains by default. Said once, by
the entry.
"""

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
        default_config: What is trained where no config is named, relative to `root`.
    """

    root: Path
    default_config: Path = Path()

    @property
    def configs(self) -> Path:
        return self.root / "configs"

    @cached_property
    def name(self) -> str:
        """In its pyproject.toml; empty in the template, and where there is none."""
        try:
            content = tomllib.loads((self.root / "pyproject.toml").read_text())
            name = str(content["project"]["name"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        return "" if name == TEMPLATE else name


_entered: Project | None = None


def enter(project: Project) -> None:
    """For the entry alone, before anything else is called."""
    global _entered
    _entered = project


def project() -> Project:
    """Where no entry named one, as in `python -m savepoint`: the nearest directory upwards that has
    a resume.py.
    """
    if _entered is not None:
        return _entered
    here = Path.cwd()
    return Project(
        next((one for one in (here, *here.parents) if (one / "resume.py").is_file()), here)
    )

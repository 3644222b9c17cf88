"""The project that this process works for: where it lies, what it trains by default. Said once, by
the entry.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path


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
        """As `make new` stamped it; empty where nothing did."""
        try:
            return str(json.loads((self.root / ".template.json").read_text())["name"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""


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

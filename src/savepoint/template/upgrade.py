"""`make upgrade`: another version of the library in a project. make installs it afterwards."""

import os
import shutil
from pathlib import Path

from savepoint import workspace
from savepoint.errors import ConfigError
from savepoint.files import rewriting
from savepoint.template import wheel as wheels


def upgrade(given: str) -> int:
    """Puts a wheel in the place of the one that requirements.txt names."""
    root = workspace.project().root
    requirements = root / "requirements.txt"
    if not given:
        raise ConfigError(
            "No wheel was named. It replaces the one in vendor/. For example: "
            "make upgrade WHEEL=path/to/savepoint_lightning-1.0-py3-none-any.whl"
        )
    text = requirements.read_text() if requirements.is_file() else ""
    old = wheels.LINE.findall(text)
    if len(old) != 1:
        raise ConfigError(
            f"Not upgraded: {requirements} names no wheel in vendor/, as a copy of make new does; "
            "in the template, and in a copy with LIBRARY=source, the library is src/savepoint. "
            "Change it there."
        )
    wheel = Path(given).expanduser().resolve()
    version = wheels.version(wheel)
    folder = root / wheels.FOLDER
    put(wheel, folder / wheel.name)
    # A crash here leaves both wheels and the old line: a second call goes on.
    with rewriting(requirements) as file:
        file.write(wheels.LINE.sub(wheels.line(wheel), text).encode())
    for other in folder.glob("savepoint_lightning-*.whl"):
        if other.name != wheel.name:
            other.unlink()  # a crash here leaves an old wheel that nothing names
    was = old[0].removeprefix(f"./{wheels.FOLDER}/savepoint_lightning-").split("-")[0]
    print(f"savepoint-lightning {was} -> {version}: vendor/ and requirements.txt, not committed.")
    environment = root / ".venv"
    if environment.is_symlink():
        others = environment.resolve().parent
        print(f"Other projects share .venv, {others} for one: they get it as well.")
    return 0


def put(wheel: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if target.exists() and os.path.samefile(wheel, target):
        return
    with rewriting(target) as file, wheel.open("rb") as read:
        shutil.copyfileobj(read, file)

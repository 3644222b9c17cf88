"""The public face of the library: its names, that they load late, and that the examples of its page
run as they stand.
"""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import forked
from support.programs import ROOT

import savepoint

PAGE = ROOT / "src" / "savepoint" / "README.md"


def examples() -> dict[str, str]:
    """The Python blocks of the page that are whole programs, by the heading above each."""
    parts = re.split(r"(?m)^## (.+)$", PAGE.read_text(encoding="utf-8"))
    found = {}
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        for block in re.findall(r"(?ms)^```python\n(.*?)^```$", text):
            found[heading] = block
    return found


@pytest.mark.parametrize("name", savepoint.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(savepoint, name) is not None
    assert name in dir(savepoint)


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        savepoint.nothing  # noqa: B018


def test_the_library_is_imported_without_torch() -> None:
    code = "import sys, savepoint; print('torch' in sys.modules, 'yaml' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False False\n"


def test_the_page_names_every_public_name() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [name for name in savepoint.__all__ if f"`{name}" not in page] == []


@pytest.mark.parametrize("heading", examples())
def test_each_example_of_the_page_runs_twice_and_goes_on_where_it_was(
    heading: str, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(examples()[heading])
    for _ in range(2):
        code, said = forked.run([str(program)], tmp_path / "said.txt", at=tmp_path)
        assert code == 0, said
    checkpoints = list(tmp_path.rglob("step-*.ckpt"))
    assert checkpoints


def test_a_loop_of_ones_own_that_is_stopped_saves_and_goes_on(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    text = examples()["A training loop of your own"]
    assert "loss.backward()" in text
    program.write_text("import os, signal\n" + text.replace("loss.backward()", "loss.backward(); stop_at(step)").replace(
        "with stoppable()", "def stop_at(step):\n    if step == 23 and not os.path.exists('stopped'):\n"
        "        open('stopped', 'w').close()\n        os.kill(os.getpid(), "
        "signal.SIGTERM)\n\n\nwith stoppable()",
    ))  # fmt: skip
    code, said = forked.run([str(program)], tmp_path / "said.txt", at=tmp_path)
    assert code == 128 + signal.SIGTERM, said
    assert (tmp_path / "checkpoints" / "step-00000024.ckpt").exists()
    code, said = forked.run([str(program)], tmp_path / "said.txt", at=tmp_path)
    assert code == 0, said
    assert "going on from step 24" in said

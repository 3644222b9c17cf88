"""`make prove` where a run never begins: stand-ins for the project's programs."""

from pathlib import Path

import pytest

from savepoint import prove, workspace


@pytest.mark.parametrize(
    ("code", "ended", "said"),
    [
        (2, 2, "Wrong.\n"),
        (1, 1, "The killed and resumed run failed. The end of its output:\nWrong."),
    ],
)
def test_what_a_run_refuses_is_its_message_and_what_fails_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    code: int,
    ended: int,
    said: str,
) -> None:
    program = f"import sys\nprint('Wrong.', file=sys.stderr)\nsys.exit({code})\n"
    for name in ("train.py", "resume.py"):
        (tmp_path / name).write_text(program)
    monkeypatch.setattr(workspace, "_entered", workspace.Project(tmp_path))
    assert prove.main(["--kills", "1", "--seed", "0"]) == ended
    assert capsys.readouterr().err.startswith(said)

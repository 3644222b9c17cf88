"""docs/tour.ipynb runs from its first cell to its last."""

from pathlib import Path
from typing import Any

import pytest
from support.limits import HANG_SECS
from support.programs import ROOT

from savepoint.run import Run


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    nbclient = pytest.importorskip("nbclient", reason="needs: make extras")
    nbformat = pytest.importorskip("nbformat", reason="needs: make extras")
    pytest.importorskip("ipykernel", reason="needs: make extras")
    outputs = tmp_path_factory.mktemp("tour")
    notebook = nbformat.read(ROOT / "docs/tour.ipynb", as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOUR_OUTPUTS", str(outputs))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("IPYTHONDIR", str(outputs / ".ipython"))
        at = {"metadata": {"path": str(ROOT / "docs")}}
        nbclient.NotebookClient(notebook, timeout=HANG_SECS, resources=at).execute()
    return notebook, outputs / "tour"


def said(cell: Any) -> str:
    parts = [one.get("text", "") for one in cell.outputs]
    parts += ["".join(one.get("data", {}).get("text/html", "")) for one in cell.outputs]
    parts += ["".join(one.get("data", {}).get("text/plain", "")) for one in cell.outputs]
    return "\n".join(parts)


def cell_with(notebook: Any, text: str) -> str:
    [cell] = [one for one in notebook.cells if one.cell_type == "code" and text in one.source]
    return said(cell)


def test_the_button_saves_as_ctrl_c_does(executed: tuple[Any, Path]) -> None:
    notebook, _ = executed
    training = cell_with(notebook, "%run -e train.py")
    assert "Continue with:" in training
    assert "Stopped by SIGINT." in training
    assert "Traceback" not in training
    assert "'signal 2', True" in cell_with(notebook, "stopped_at.manifest")


def test_the_run_goes_on_to_its_end(executed: tuple[Any, Path]) -> None:
    notebook, run_dir = executed
    assert "best val/accuracy" in cell_with(notebook, "resume.py")
    latest = Run(run_dir).store.latest()
    assert latest is not None
    assert (latest.step, latest.manifest["exact"]) == (120, True)


def test_progress_and_tables_are_html(executed: tuple[Any, Path]) -> None:
    notebook, _ = executed
    assert "<progress value=" in cell_with(notebook, "%run -e train.py")
    assert "<table><tr><th>" in cell_with(notebook, "savepoint ls")
    assert "<th>it says</th>" in cell_with(notebook, "worst =")


def test_a_step_of_it_is_replayed(executed: tuple[Any, Path]) -> None:
    notebook, _ = executed
    assert ": equal to the log" in cell_with(notebook, "savepoint replay")


def test_the_notebook_is_kept_without_outputs() -> None:
    import json

    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    assert [one for one in cells if one.get("outputs") or one.get("execution_count")] == []

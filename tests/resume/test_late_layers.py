"""Layers that `setup` or `configure_model` makes, weights that a file leaves out, names that
`torch.compile` changes.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support import late_layers
from support.late_layers import config
from support.programs import begin, go
from support.run_dirs import say
from support.small import difference

from savepoint.checkpoint import store
from savepoint.comparing import comparable
from savepoint.errors import ConfigMismatchError
from savepoint.rebuilding import rebuild

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")

KINDS: dict[str, dict[str, Any]] = {
    "setup": {"made_in": "setup"},
    "setup by the data": {"made_in": "data"},
    "configure_model": {"made_in": "configure_model"},
    "frozen": {"frozen": True},
    "compiled": {"compiled": True},
}
EACH = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def last(run_dir: Path) -> dict[str, Any]:
    return comparable(store.load(run_dir / "checkpoints" / "last.ckpt")[0])


def weights(run_dir: Path) -> dict[str, Any]:
    return store.load(run_dir / "checkpoints" / "last.ckpt")[0]["state_dict"]


def cut(run_dir: Path, *, to: int = 4) -> None:
    """As it was when its first epoch had ended."""
    (run_dir / "summary.json").unlink()
    for file in (run_dir / "checkpoints").iterdir():
        if file.name != f"step-{to:08d}.ckpt":
            file.unlink()


@EACH
def test_it_is_trained_tested_resumed_evaluated_exported_and_taken_as_a_start(
    kind: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = config(tmp_path, **kind)
    run_dir = tmp_path / "outputs" / "run"
    assert begin(*flags) == 0
    tested = json.loads((run_dir / "summary.json").read_text())
    straight = Path(shutil.copytree(run_dir, tmp_path / "straight"))
    cut(run_dir)
    assert go(str(run_dir)) == 0
    assert not list(
        difference(last(straight)["optimizer_states"], last(run_dir)["optimizer_states"])
    )
    assert not list(difference(last(straight)["state_dict"], last(run_dir)["state_dict"]))
    again = json.loads((run_dir / "summary.json").read_text())
    assert again["test/loss"] == tested["test/loss"]
    (run_dir / "summary.json").unlink()
    assert go(str(run_dir)) == 0
    assert json.loads((run_dir / "summary.json").read_text())["test/loss"] == tested["test/loss"]
    capsys.readouterr()
    code, out, err = say(capsys, "eval", str(run_dir), "--json")
    assert code == 0, err
    assert json.loads(out)["metrics"]["test/loss"] == tested["test/loss"]
    code, _, err = say(
        capsys,
        "export",
        str(run_dir),
        "--format",
        "safetensors",
        "-o",
        str(tmp_path / "a.safetensors"),
    )
    assert code == 0, err
    strict = ["--init_strict", "false"] if kind.get("frozen") else []
    assert (
        begin(
            *flags[:-1], "other", "--init_from", str(run_dir / "checkpoints" / "last.ckpt"), *strict
        )
        == 0
    )
    assert "Weights from" in capsys.readouterr().out


@pytest.mark.parametrize(("was", "now"), [("false", "true"), ("true", "false")])
def test_compiling_may_be_switched_between_a_run_and_its_resume(
    was: str, now: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = config(tmp_path, compiled=was)
    run_dir = tmp_path / "outputs" / "run"
    assert begin(*flags) == 0
    straight = Path(shutil.copytree(run_dir, tmp_path / "straight"))
    cut(run_dir)
    assert go(str(run_dir), "--model.compiled", now, "--allow", "model.compiled") == 0
    assert list(weights(straight)) != list(weights(run_dir))
    for one, other in zip(weights(straight).values(), weights(run_dir).values(), strict=True):
        assert torch.equal(one, other)
    assert not list(
        difference(last(straight)["optimizer_states"], last(run_dir)["optimizer_states"])
    )
    capsys.readouterr()
    code, out, err = say(capsys, "eval", str(straight), "--model.compiled", now, "--json")
    assert code == 0, err
    code, out, _ = say(capsys, "diff", str(straight), str(run_dir), "--json")
    assert json.loads(out)["weights"] == []
    other = [*flags[:-1], "other", "--model.compiled", now]
    assert begin(*other, "--init_from", str(straight / "checkpoints" / "last.ckpt")) == 0
    for kind in ("safetensors", "state_dict", "npz"):
        file = tmp_path / f"a.{kind}"
        code, _, err = say(capsys, "export", str(straight), "--format", kind, "-o", str(file))
        assert code == 0, err
        assert b"_orig_mod" not in file.read_bytes()


def test_late_layers_of_another_size_are_refused_with_names_and_shapes(tmp_path: Path) -> None:
    flags = config(tmp_path, made_in="configure_model")
    assert begin(*flags) == 0
    run_dir = tmp_path / "outputs" / "run"
    cut(run_dir)
    with pytest.raises(
        ConfigMismatchError, match=r"net\.0\.weight: \[4, 4\] in the file, \[5, 4\] in the model"
    ):
        go(str(run_dir), "--model.width", "5", "--allow", "model.width")
    with pytest.raises(ConfigMismatchError, match="Another architecture"):
        rebuild(run_dir / "checkpoints" / "step-00000004.ckpt", ["--model.width", "5"])


def parts_of_the_run(run_dir: Path) -> float:
    """Names the test's samples: the mean of their numbers."""
    found: float = json.loads((run_dir / "summary.json").read_text())["test/first"]
    return found


def test_a_split_that_is_drawn_in_setup_is_the_same_at_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[tuple[str, list[int], list[int]]] = []
    setup = late_layers.Split.setup

    def recorded(self: late_layers.Split, stage: str) -> None:
        setup(self, stage)
        drawn.append((str(stage), *(list(self.parts[place].indices) for place in (0, 2))))

    monkeypatch.setattr(late_layers.Split, "setup", recorded)
    run_dir = tmp_path / "outputs" / "run"
    assert begin(*config(tmp_path)) == 0
    straight = parts_of_the_run(run_dir)
    cut(run_dir)
    assert go(str(run_dir)) == 0
    resumed = parts_of_the_run(run_dir)
    (run_dir / "summary.json").unlink()
    assert go(str(run_dir)) == 0
    completed = parts_of_the_run(run_dir)
    capsys.readouterr()
    evaluated = json.loads(say(capsys, "eval", str(run_dir), "--json")[1])["metrics"]["test/first"]
    assert straight == resumed == completed == evaluated
    assert len(drawn) == 6
    assert not set(drawn[0][1]) & set(drawn[0][2])
    assert all(one[1:] == drawn[0][1:] for one in drawn)

"""What `savepoint export` writes, read by the libraries it is written for, without any code of
ours.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from support.trained import Capture, altered, best, say, trained
from torch import Tensor

import project
from savepoint import export
from savepoint.checkpoint import store
from savepoint.commands.export import SUFFIXES
from savepoint.errors import ConfigError
from savepoint.rebuilding import rebuild

READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "safetensors": safetensors.torch.load_file,
    "npz": lambda path: {
        name: torch.from_numpy(value) for name, value in np.load(path, allow_pickle=False).items()
    },
    "state_dict": lambda path: torch.load(path, weights_only=True),
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.getbasetemp())


def same(weights: dict[str, Tensor], file: Path) -> bool:
    wanted = store.load(file)[0]["state_dict"]
    return weights.keys() == wanted.keys() and all(
        value.dtype == wanted[name].dtype and torch.equal(value, wanted[name])
        for name, value in weights.items()
    )


@pytest.mark.parametrize("kind", READERS)
def test_weights_are_read_back_bit_for_bit_by_a_stock_reader(
    run_dir: Path, tmp_path: Path, kind: str, capsys: Capture
) -> None:
    target = tmp_path / "new" / "a.weights"
    code, out, err = say(capsys, "export", str(run_dir), "--format", kind, "-o", str(target))
    assert (code, err) == (0, "")
    assert same(READERS[kind](target), best(run_dir))
    assert "parity: largest difference 0 (expected 0)" in out
    assert "input: uint8 [batch, 1, 28, 28]" in out
    assert [path.name for path in target.parent.iterdir()] == ["a.weights"]


def test_of_a_run_it_is_the_best_checkpoint_and_of_a_file_that_one(
    run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy = Path(shutil.copytree(run_dir, tmp_path / "copy"))
    state, facts = store.load(best(copy))
    weights = {name: value + 1 for name, value in state["state_dict"].items()}
    worse = facts | {"step": 99, "metrics": {"val/accuracy": {"value": 0.0, "step": 99}}}
    newer = copy / "checkpoints" / "step-00000099.ckpt"
    store.write(newer, state | {"state_dict": weights, "canary": None}, worse)
    code, out, _ = say(capsys, "export", str(copy), "--format", "safetensors")
    assert code == 0
    at = f"step {facts['step']}, epoch {facts['epoch']}"
    assert f"{best(copy)}: {at} (best of the run: val/accuracy" in out
    assert same(READERS["safetensors"](copy / f"{best(copy).stem}.safetensors"), best(copy))
    code, out, _ = say(capsys, "export", str(newer), "--format", "safetensors")
    assert code == 0
    assert "best of the run" not in out
    assert same(READERS["safetensors"](copy / "step-00000099.safetensors"), newer)


def test_with_weight_averaging_the_averaged_weights_are_exported_and_it_says_so(
    run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    current = {
        name: value + 1 for name, value in store.load(best(run_dir))[0]["state_dict"].items()
    }
    file = altered(best(run_dir), tmp_path / "a.ckpt", current_model_state=current)
    code, out, _ = say(capsys, "export", str(file), "--format", "safetensors")
    assert code == 0
    assert "weights: the averaged ones, as in the run's test" in out
    assert same(READERS["safetensors"](tmp_path / "a.safetensors"), file)


def test_a_file_says_where_it_comes_from_and_what_it_takes(
    run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "a.safetensors"
    code, out, _ = say(
        capsys, "export", str(run_dir), "--format", "safetensors", "-o", str(target), "--json"
    )
    assert code == 0
    with safetensors.safe_open(target, "pt") as file:
        said = file.metadata()
    _, facts = store.load(best(run_dir))
    assert said["format"] == "pt"
    assert said["run_id"] == json.loads((run_dir / "run.json").read_text())["id"]
    assert said["digest"] == facts["digest"]
    assert int(said["step"]) == facts["step"]
    assert json.loads(said["metrics"])["val/accuracy"] == facts["metrics"]["val/accuracy"]["value"]
    assert json.loads(said["classes"]) == list("0123456789")
    assert json.loads(said["model"])["init_args"]["mean"] == 0.1307
    assert json.loads(out)["metadata"]["digest"] == facts["digest"]
    assert json.loads(out)["parity"]["largest"] == 0


def test_a_file_that_is_there_is_refused_and_replaced_with_force(
    run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "a.npz"
    target.write_text("somebody's")
    words = ["export", str(run_dir), "--format", "npz", "-o", str(target)]
    code, _, err = say(capsys, *words)
    assert code == 2
    assert f"There already: {target}." in err
    assert target.read_text() == "somebody's"
    assert say(capsys, *words, "--force")[0] == 0
    assert same(READERS["npz"](target), best(run_dir))


@pytest.mark.parametrize("kind", READERS)
def test_a_file_that_does_not_hold_the_weights_is_not_kept(
    run_dir: Path, tmp_path: Path, kind: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = export._weights

    def one_bit_off(made: Any) -> dict[str, Tensor]:
        found = weights(made)
        found["net.classify.bias"].view(torch.int32)[3] ^= 1
        return found

    monkeypatch.setattr(export, "_weights", one_bit_off)
    target = tmp_path / "a.weights"
    target.write_text("the old one")
    code, _, err = say(
        capsys, "export", str(run_dir), "--format", kind, "-o", str(target), "--force"
    )
    assert code == 1
    assert "holds other weights than the checkpoint: net.classify.bias" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.weights"]
    assert target.read_text() == "the old one"


def test_a_file_that_computes_something_else_is_not_kept(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, read, exact = export._FORMATS["safetensors"]

    def far(made: Any, file: Any) -> Callable[[Tensor], Tensor]:
        run = read(made, file)
        return lambda example: run(example) + 0.01

    monkeypatch.setitem(export._FORMATS, "safetensors", (write, far, False))
    with pytest.raises(export.ParityError, match=r"largest difference 0\.01"):
        export.export(rebuild(best(run_dir)), tmp_path / "a", "safetensors")
    assert list(tmp_path.iterdir()) == []
    assert exact


def test_without_a_canary_it_is_exported_and_said_to_be_unchecked(
    run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    bare = altered(best(run_dir), tmp_path / "bare.ckpt", canary=None)
    code, out, _ = say(capsys, "export", str(bare), "--format", "state_dict")
    assert code == 0
    assert "parity: not checked, this checkpoint has no canary" in out
    assert same(READERS["state_dict"](tmp_path / "bare.pt"), bare)


def test_a_model_without_an_example_input_has_weights_but_no_program(
    run_dir: Path, tmp_path: Path
) -> None:
    made = rebuild(altered(best(run_dir), tmp_path / "bare.ckpt", canary=None))
    made.model.example_input_array = None
    with pytest.raises(ConfigError, match="No example input: ImageClassifier"):
        export.export(made, tmp_path / "a.pt2", "pt2")
    assert not (tmp_path / "a.pt2").exists()
    assert export.export(made, tmp_path / "a.npz", "npz") is None


def test_a_model_that_cannot_be_traced_is_said_and_nothing_is_left(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = project.ConvNet.forward

    def depends_on_values(self: project.ConvNet, images: Tensor) -> Tensor:
        return forward(self, images if images.sum() > 0 else -images)

    monkeypatch.setattr(project.ConvNet, "forward", depends_on_values)
    with pytest.raises(ConfigError, match="Not possible as pt2: ImageClassifier") as error:
        export.export(rebuild(best(run_dir)), tmp_path / "a.pt2", "pt2")
    assert len(str(error.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_no_type_of_npz_and_safetensors_keeps_it(run_dir: Path, tmp_path: Path) -> None:
    weights = {
        name: value.bfloat16() for name, value in store.load(best(run_dir))[0]["state_dict"].items()
    }
    config = store.load(best(run_dir))[0]["config"].replace(
        "precision: null", "precision: bf16-true"
    )
    file = altered(
        best(run_dir), tmp_path / "a.ckpt", state_dict=weights, config=config, canary=None
    )
    made = rebuild(file)
    with pytest.raises(ConfigError, match="npz has no bfloat16"):
        export.export(made, tmp_path / "a.npz", "npz")
    export.export(made, tmp_path / "a.safetensors", "safetensors")
    assert same(READERS["safetensors"](tmp_path / "a.safetensors"), file)


def test_pt2_runs_without_our_code_for_batches_of_any_size(
    run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    target = tmp_path / "a.pt2"
    code, out, err = say(
        capsys, "export", str(run_dir), "--format", "pt2", "-o", str(target), "--json"
    )
    assert (code, err) == (0, "")
    assert json.loads(out)["parity"]["largest"] <= json.loads(out)["parity"]["allowed"] < 0.01
    extra = {"metadata.json": ""}
    program = torch.export.load(target, extra_files=extra)
    assert json.loads(extra["metadata.json"])["step"] == store.load(best(run_dir))[1]["step"]
    wanted = store.load(best(run_dir))[0]["state_dict"]
    for name, value in program.state_dict.items():
        assert torch.equal(value, wanted[name]), name
    made, run = rebuild(best(run_dir)), program.module()
    for size in (1, 3, 20):
        images = torch.randint(
            256, (size, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)
        )
        with torch.no_grad():
            torch.testing.assert_close(run(images), made.model(images), rtol=0, atol=1e-5)


def test_onnx_runs_without_our_code_for_batches_of_any_size(
    run_dir: Path, tmp_path: Path, capsys: Capture
) -> None:
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    target = tmp_path / "a.onnx"
    code, out, err = say(capsys, "export", str(run_dir), "--format", "onnx", "-o", str(target))
    assert (code, err) == (0, "")
    assert "opset 18" in out
    model = onnx.load(target)
    assert [(one.domain, one.version) for one in model.opset_import] == [("", 18)]
    wanted = store.load(best(run_dir))[0]["state_dict"]
    kept = {one.name: onnx.numpy_helper.to_array(one) for one in model.graph.initializer}
    assert {
        name for name in wanted if name.endswith(("weight", "bias", "mean", "var"))
    } <= kept.keys()
    assert all(
        np.array_equal(kept[name], value.numpy()) for name, value in wanted.items() if name in kept
    )
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    said = session.get_modelmeta().custom_metadata_map
    assert json.loads(said["classes"]) == list("0123456789")
    made = rebuild(best(run_dir))
    for size in (1, 3, 20):
        images = torch.randint(
            256, (size, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(size)
        )
        (logits,) = session.run(["output"], {"input": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(
                torch.from_numpy(logits), made.model(images), rtol=0, atol=1e-4
            )


def test_where_onnx_is_not_installed_the_extra_is_named(
    run_dir: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )
    code, _, err = say(capsys, "export", str(run_dir), "--format", "onnx")
    assert code == 2
    assert "Not installed: " in err
    assert "onnxruntime. The format onnx needs it" in err or "onnxruntime, " in err
    assert "make extras, or pip install 'savepoint-lightning[onnx]'" in err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["RUN"], "--format"),
        (["RUN", "--format", "tflite"], "tflite"),
        (["RUN/none", "--format", "npz"], "Nothing there: RUN/none"),
        (["RUN", "--format", "npz", "-o", "RUN"], "A directory, not a file: RUN"),
        (["RUN", "--format", "npz", "-o", "/proc/x/a.npz"], "/proc/x"),
        (["RUN/run.json", "--format", "npz"], "Not a checkpoint of Savepoint: RUN/run.json"),
    ],
)
def test_bad_input_is_one_to_five_lines(
    run_dir: Path, words: list[str], said: str, capsys: Capture
) -> None:
    code, out, err = say(capsys, "export", *[word.replace("RUN", str(run_dir)) for word in words])
    assert (code, out) == (2, "")
    assert said.replace("RUN", str(run_dir)) in err
    assert 1 <= len(err.splitlines()) <= 5


def test_each_format_has_a_name_for_its_file() -> None:
    assert SUFFIXES.keys() == export._FORMATS.keys() | {"json", "ckpt"}  # which need no model

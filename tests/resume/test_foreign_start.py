"""A new run from a file of another program takes what the file has, and says what it lacks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support.programs import FOUR_AN_EPOCH as SMALL
from support.programs import begin, go, steps

import project
from savepoint.checkpoint import store
from savepoint.errors import ConfigMismatchError

CLASSIC = ["--config", "configs/mnist.yaml", "--model.net", "ClassicNet", *SMALL]
CLASSIC = [
    word
    for pair in zip(CLASSIC[::2], CLASSIC[1::2], strict=True)
    if "width" not in pair[0]
    for word in pair
]

BRIEF = ["--trainer.max_epochs", "1"]


def floyd(path: Path, **more: Any) -> project.ClassicNet:
    """As the classic tutorial saves it: the bare network, under the names it has there."""
    torch.manual_seed(5)
    net = project.ClassicNet()
    torch.save(
        {"epoch": 2, "state_dict": net.state_dict(), "best_accuracy": torch.tensor([93.5])} | more,
        path,
    )
    return net


@pytest.mark.parametrize(
    "best", [0.935, torch.tensor([93.5]), np.float64(0.935)], ids=["float", "percent", "numpy"]
)
def test_a_floydhub_file_continues_at_its_epoch_with_its_best_accuracy(
    best: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floyd(tmp_path / "checkpoint.pth.tar", best_accuracy=best)
    assert (
        go(
            str(tmp_path / "checkpoint.pth.tar"),
            *CLASSIC,
            "--output_dir",
            str(tmp_path / "out"),
            "--run_name",
            "on",
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "epoch 2, best accuracy 0.935" in said
    assert "did not improve from 0.9350" in said
    # Two epochs of four steps counted, the third trained.
    assert steps(tmp_path / "out" / "on") == [12]
    state, _ = store.load(tmp_path / "out" / "on" / "checkpoints" / "last.ckpt")
    assert state["epoch"] == 3
    assert state["best_accuracy"] == pytest.approx(0.935)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net."])
def test_weights_under_other_prefixes_are_taken(prefix: str, tmp_path: Path) -> None:
    net = floyd(tmp_path / "unused")
    torch.save(
        {prefix + name: value for name, value in net.state_dict().items()}, tmp_path / "weights.pt"
    )
    command = [
        *CLASSIC,
        "--init_from",
        str(tmp_path / "weights.pt"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert begin(*command, *BRIEF, "--run_name", "on", "--model.lr", "0") == 0
    state, _ = store.load(tmp_path / "out" / "on" / "checkpoints" / "last.ckpt")
    assert torch.equal(state["state_dict"]["net.fc1.weight"], net.fc1.weight)


def test_safetensors_and_old_files_are_read(tmp_path: Path) -> None:
    net = floyd(tmp_path / "unused")
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    torch.save(
        {"state_dict": net.state_dict()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    for name in ("weights.safetensors", "old.pth"):
        out = ["--output_dir", str(tmp_path / "out"), "--run_name", name]
        assert go(str(tmp_path / name), *CLASSIC, *out, *BRIEF, "--model.lr", "0") == 0
        state, _ = store.load(tmp_path / "out" / name / "checkpoints" / "last.ckpt")
        assert torch.equal(state["state_dict"]["net.conv1.weight"], net.conv1.weight)


def test_an_optimizer_in_the_file_is_taken_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = project.ClassicNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.5)
    net(torch.rand(2, 1, 28, 28)).sum().backward()
    optimizer.step()
    floyd(tmp_path / "with.pth", optimizer=optimizer.state_dict())
    assert (
        go(
            str(tmp_path / "with.pth"),
            *CLASSIC,
            "--output_dir",
            str(tmp_path / "out"),
            "--run_name",
            "on",
        )
        == 0
    )
    assert "optimizer" in capsys.readouterr().out.split("It lacks")[0]
    state, _ = store.load(tmp_path / "out" / "on" / "checkpoints" / "last.ckpt")
    assert float(state["optimizer"]["state"][0]["step"]) == 5  # one there, four here


def test_weights_of_another_network_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    floyd(tmp_path / "classic.pth")
    command = [str(tmp_path / "classic.pth"), "--config", "configs/mnist.yaml", *SMALL]
    with pytest.raises(ConfigMismatchError, match=r"features.*\n.*conv|features(.*\n)*.*fc2"):
        go(*command, "--output_dir", str(tmp_path / "out"), "--run_name", "on")
    assert not (tmp_path / "out" / "on").exists()


class TestInitFrom:
    def test_partial_loading_takes_what_fits_and_prints_the_rest(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        net = floyd(tmp_path / "unused")
        weights = net.state_dict()
        weights["fc2.weight"] = torch.zeros(3, 128)
        weights["fc1.wieght"] = weights.pop("fc1.weight")
        torch.save(weights, tmp_path / "weights.pt")
        command = [
            *CLASSIC,
            "--init_from",
            str(tmp_path / "weights.pt"),
            "--output_dir",
            str(tmp_path / "out"),
        ]
        with pytest.raises(ConfigMismatchError, match="--init_strict false"):
            begin(*command, "--run_name", "strict")
        assert not (tmp_path / "out" / "strict").exists()
        assert begin(*command, *BRIEF, "--run_name", "loose", "--init_strict", "false") == 0
        said = capsys.readouterr().out
        assert "net.fc1.weight [128, 9216]: not in the file (nearest: net.fc1.wieght)" in said
        assert "net.fc2.weight: [3, 128] in the file, [10, 128] in the model" in said


def test_a_flat_npz_of_another_framework_goes_on_with_a_table_of_what_went_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = project.ClassicNet().state_dict()
    arrays = {}
    for place, name in {
        "Conv_0": "conv1",
        "Conv_1": "conv2",
        "Dense_0": "fc1",
        "Dense_1": "fc2",
    }.items():
        weight = net[f"{name}.weight"]
        kernel = weight.permute(2, 3, 1, 0) if weight.dim() == 4 else weight.t()
        arrays |= {
            f"params/{place}/kernel": kernel.numpy(),
            f"params/{place}/bias": net[f"{name}.bias"].numpy(),
        }
    np.savez(tmp_path / "net.npz", **arrays)
    words = [*CLASSIC, *BRIEF, "--output_dir", str(tmp_path), "--run_name", "on"]
    assert go(str(tmp_path / "net.npz"), *words) == 0
    said = capsys.readouterr().out
    assert "net.npz (npz): weights. It lacks epoch, best_accuracy, optimizer" in said
    [kernel] = [line for line in said.splitlines() if line.startswith("params/Dense_0/kernel")]
    assert kernel.split()[1:6] == ["[9216,", "128]", "net.fc1.weight", "[128,", "9216]"]
    assert steps(tmp_path / "on") == [4]

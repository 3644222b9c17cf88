"""Model and data from a checkpoint alone: what is taken from it, and what is refused."""

from pathlib import Path

import pytest
import torch
from support.trained import altered, best, trained
from torch import Tensor, nn

import project
from savepoint.checkpoint import store
from savepoint.errors import ConfigError, ConfigMismatchError
from savepoint.rebuilding import rebuild


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return best(trained(tmp_path_factory.getbasetemp()))


def test_the_model_has_the_weights_of_the_file_and_is_in_eval_mode(checkpoint: Path) -> None:
    made, (state, _) = rebuild(checkpoint), store.load(checkpoint)
    assert not any(part.training for part in made.model.modules())
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, state["state_dict"][name]), name


def test_what_the_run_was_trained_on_need_not_be_there(checkpoint: Path, tmp_path: Path) -> None:
    config = store.load(checkpoint)[0]["config"]
    assert "accelerator: cpu" in config
    assert "root: null" in config
    elsewhere = config.replace("accelerator: cpu", "accelerator: gpu").replace(
        "strategy: auto", "strategy: ddp"
    )
    elsewhere = elsewhere.replace("devices: auto", "devices: 4").replace(
        "num_nodes: 1", "num_nodes: 2"
    )
    elsewhere = elsewhere.replace("dataset: digits", "dataset: mnist").replace(
        "root: null", "root: /gone/data"
    )
    made = rebuild(altered(checkpoint, tmp_path / "a.ckpt", config=elsewhere))
    assert made.trainer.world_size == 1
    assert made.data.root == Path("/gone/data")


def test_an_override_wins_over_the_config_in_the_file(checkpoint: Path) -> None:
    made = rebuild(checkpoint, ["--data.batch_size", "7", "--trainer.limit_test_batches=3"])
    assert made.data.batch_size == 7
    assert made.trainer.limit_test_batches == 3


def test_another_architecture_is_refused_with_the_names_that_differ(checkpoint: Path) -> None:
    with pytest.raises(
        ConfigMismatchError,
        match=r"net\.features\.0\.weight: \[4, 1, 3, 3\] in the file, \[8, 1, 3, 3\]",
    ):
        rebuild(checkpoint, ["--model.net.width", "8"])


def test_a_forward_that_has_changed_is_refused_unless_allowed(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = project.ConvNet.forward

    def doubled(self: nn.Module, images: Tensor) -> Tensor:
        return 2 * forward(self, images)

    monkeypatch.setattr(project.ConvNet, "forward", doubled)
    with pytest.raises(ConfigMismatchError, match="computes something else"):
        rebuild(checkpoint)
    _, facts = store.load(checkpoint)
    assert rebuild(checkpoint, allow=["canary"]).manifest["step"] == facts["step"]


def test_a_checkpoint_without_a_config_says_so(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No config in this checkpoint"):
        rebuild(altered(checkpoint, tmp_path / "a.ckpt", config=""))


def test_a_run_in_another_precision_is_rebuilt_in_it(checkpoint: Path, tmp_path: Path) -> None:
    state, _ = store.load(checkpoint)
    weights = {name: value.double() for name, value in state["state_dict"].items()}
    config = state["config"].replace("precision: null", "precision: 64-true")
    made = rebuild(altered(checkpoint, tmp_path / "a.ckpt", state_dict=weights, config=config))
    assert {value.dtype for value in made.model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("dataset", "classes"), [("digits", list("0123456789")), ("fashion", None)]
)
def test_classes_have_the_names_of_the_data_that_was_trained_on(
    checkpoint: Path, tmp_path: Path, dataset: str, classes: list[str] | None
) -> None:
    """Of a run on Fashion-MNIST that fell back on the digits, `Boot` is no name for a 9."""
    config = store.load(checkpoint)[0]["config"].replace("dataset: digits", f"dataset: {dataset}")
    assert rebuild(altered(checkpoint, tmp_path / "a.ckpt", config=config)).classes == classes

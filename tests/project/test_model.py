from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image, ImageChops
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from project import ClassicNet, ConvNet, ImageClassifier
from project.figures import CELL, draw_confusion, draw_mistakes
from savepoint import Batches
from savepoint.config import typed
from savepoint.errors import ConfigError
from savepoint.schedules import one_cycle

# Lightning 2.6 asks torch 2.15 about its trees in a way that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")

NAMES = tuple("0123456789")


class FewImages(LightningDataModule):
    """30 random images for each part, in batches of 8: the last one is shorter."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(256, (30, 1, 28, 28), dtype=torch.uint8, generator=generator)
        self.labels = torch.randint(10, (30,), generator=generator)

    def loader(self, shuffle: bool = False) -> Batches:
        return Batches(self.images, self.labels, batch_size=8, seed=0, shuffle=shuffle)

    def train_dataloader(self) -> Batches:
        return self.loader(shuffle=True)

    val_dataloader = test_dataloader = loader


class Unsure(nn.Module):
    """Guesses from the upper left pixel: what it answers is known, and can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :10] + self.bias


def trainer(tmp_path: Path, **arguments: Any) -> Trainer:
    return Trainer(
        **{
            "accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "log_every_n_steps": 2, "default_root_dir": tmp_path, **arguments,
        }
    )  # fmt: skip


def learning_rates(model: ImageClassifier, **arguments: Any) -> list[float]:
    """The learning rate at each step of a training."""
    rates: list[float] = []
    step = model.optimizer_step

    def record(epoch: int, batch: int, optimizer: Any, closure: Any = None) -> None:
        rates.append(optimizer.param_groups[0]["lr"])
        step(epoch, batch, optimizer, closure)

    model.optimizer_step = record  # type: ignore[method-assign]
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer(**arguments).fit(model, FewImages(), ckpt_path=ckpt_path, weights_only=True)
    return rates


# --- networks ---


@pytest.mark.parametrize(("net", "parameters"), [(ConvNet, 47_194), (ClassicNet, 1_199_882)])
def test_a_net_gives_one_logit_a_class_and_has_its_number_of_parameters(
    net: type[nn.Module], parameters: int
) -> None:
    assert net()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert net(num_classes=4)(torch.zeros(3, 1, 28, 28)).shape == (3, 4)
    assert sum(parameter.numel() for parameter in net().parameters()) == parameters


def test_uint8_images_and_the_same_ones_as_floats_in_0_to_1_give_the_same_logits() -> None:
    model = ImageClassifier(ConvNet()).eval()
    images = model.example_input_array
    assert torch.equal(model(images), model(images / 255))


def test_the_net_gets_normalised_images() -> None:
    seen = []
    model = ImageClassifier(nn.Identity(), mean=0.5, std=0.25)
    model.net.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1))
    assert seen[0].flatten().tolist() == [-2.0, 2.0]


def test_the_example_input_is_the_same_for_every_model() -> None:
    one, other = (ImageClassifier(ConvNet()).example_input_array for _ in range(2))
    assert (one.dtype, one.shape) == (torch.uint8, (8, 1, 28, 28))
    assert torch.equal(one, other)
    assert one.unique().numel() == 256


# --- training ---


def test_a_training_and_its_test_log_loss_and_accuracy_of_each_part(tmp_path: Path) -> None:
    train = trainer(tmp_path)
    train.fit(ImageClassifier(ConvNet()), FewImages())
    assert set(train.callback_metrics) == {
        "train/loss_step", "train/loss", "train/accuracy", "val/loss", "val/accuracy"
    }  # fmt: skip
    assert set(train.test(ImageClassifier(ConvNet()), FewImages(), verbose=False)[0]) == {
        "test/loss",
        "test/accuracy",
    }


def test_metrics_are_means_over_samples_not_over_batches(tmp_path: Path) -> None:
    """Also of training: with a learning rate of 0 it sees the same net throughout."""
    data, model = (
        FewImages(),
        ImageClassifier(Unsure(), lr=0.0, schedule="constant", weight_decay=0.0),
    )
    train = trainer(tmp_path)
    train.fit(model, data)
    logits = model(data.images)
    plain, smoothed = (F.cross_entropy(logits, data.labels, label_smoothing=s) for s in (0.0, 0.1))
    right = (logits.argmax(1) == data.labels).float().mean()
    metrics = train.callback_metrics
    torch.testing.assert_close(metrics["val/loss"], plain)
    torch.testing.assert_close(metrics["train/loss"], smoothed)
    assert metrics["val/accuracy"] == metrics["train/accuracy"] == right
    assert train.test(model, data, verbose=False)[0]["test/accuracy"] == right


def test_epoch_metrics_start_anew_in_every_epoch(tmp_path: Path) -> None:
    model = ImageClassifier(Unsure(), lr=0.0, schedule="constant", weight_decay=0.0)
    losses = []
    for epochs in (1, 3):
        train = trainer(tmp_path, max_epochs=epochs)
        train.fit(model, FewImages())
        losses.append(train.callback_metrics["val/loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adadelta"])
def test_each_optimizer_trains(tmp_path: Path, optimizer: Any) -> None:
    model = ImageClassifier(Unsure(), optimizer=optimizer, lr=0.1, schedule="constant")
    trainer(tmp_path, max_epochs=3).fit(model, FewImages())
    assert type(model.optimizers().optimizer).__name__.lower() == optimizer
    assert model.net.bias.abs().sum() > 0


def test_the_learning_rate_follows_the_schedule_step_by_step(tmp_path: Path) -> None:
    rates = learning_rates(ImageClassifier(Unsure(), lr=0.5), tmp_path=tmp_path, max_epochs=2)
    assert rates == [0.5 * one_cycle(step, 8) for step in range(8)]


def test_training_on_past_the_end_of_a_schedule_goes_on(tmp_path: Path) -> None:
    model = ImageClassifier(Unsure(), lr=0.5)
    train = trainer(tmp_path, max_epochs=1)
    train.fit(model, FewImages())
    train.save_checkpoint(tmp_path / "end.ckpt", weights_only=False)
    rates = learning_rates(
        ImageClassifier(Unsure(), lr=0.5),
        tmp_path=tmp_path,
        max_epochs=3,
        ckpt_path=tmp_path / "end.ckpt",
    )
    assert rates == [0.5 * one_cycle(4, 4), *(0.5 * one_cycle(step, 12) for step in range(5, 12))]


def test_a_schedule_with_an_end_refuses_a_training_without_one(tmp_path: Path) -> None:
    endless = trainer(tmp_path, max_epochs=-1, max_steps=-1)
    with pytest.raises(ConfigError, match=r"model\.schedule is one_cycle.*--trainer\.max_epochs"):
        endless.fit(ImageClassifier(Unsure()), FewImages())


def test_a_checkpoint_holds_plain_values_only(tmp_path: Path) -> None:
    train = trainer(tmp_path)
    train.fit(ImageClassifier(ConvNet(), lr=0.25), FewImages())
    train.save_checkpoint(tmp_path / "it.ckpt", weights_only=False)
    checkpoint = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["lr"] == 0.25
    assert checkpoint["lr_schedulers"][0]["lr_lambdas"] == [None]


def test_a_checkpoint_of_a_net_built_in_python_is_loaded_with_that_net(tmp_path: Path) -> None:
    model, train = ImageClassifier(ConvNet(width=4), lr=0.25), trainer(tmp_path)
    train.fit(model, FewImages())
    train.save_checkpoint(tmp_path / "it.ckpt", weights_only=False)
    loaded = ImageClassifier.load_from_checkpoint(
        tmp_path / "it.ckpt", net=ConvNet(width=4), weights_only=True
    )
    images = model.example_input_array
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    assert loaded.lr == 0.25


def test_a_checkpoint_of_a_config_names_its_net_and_loads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("it.yaml").write_text(
        "data: {class_path: ImageData}\nmodel:\n  class_path: ImageClassifier\n"
        "  init_args: {lr: 0.25, net: {class_path: ConvNet, init_args: {width: 4}}}\n"
    )
    model, _, _ = typed.instantiate(typed.parse(["--config", "it.yaml"]))
    train = trainer(tmp_path)
    train.fit(model, FewImages())
    train.save_checkpoint(tmp_path / "it.ckpt", weights_only=False)
    hyperparameters = torch.load(tmp_path / "it.ckpt", weights_only=True)["hyper_parameters"]
    assert hyperparameters["net"] == {
        "class_path": "project.ConvNet",
        "init_args": {"width": 4, "num_classes": 10},
    }
    assert not isinstance(hyperparameters["net"], Namespace)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "it.ckpt", weights_only=True)
    images = model.example_input_array
    assert torch.equal(loaded.eval()(images), model.eval()(images))
    assert loaded.lr == 0.25


# --- figures ---


def figures(directory: Path) -> dict[str, Image.Image]:
    events = EventAccumulator(str(directory), size_guidance={"images": 0}).Reload()
    return {
        tag: Image.open(BytesIO(events.Images(tag)[0].encoded_image_string))
        for tag in events.Tags()["images"]
    }


def test_a_test_leaves_a_confusion_matrix_and_its_worst_mistakes_in_tensorboard(
    tmp_path: Path,
) -> None:
    seed_everything(0, verbose=False)
    train = trainer(tmp_path, logger=TensorBoardLogger(tmp_path, name="run", version=""))
    train.test(ImageClassifier(Unsure()), FewImages(), verbose=False)
    train.logger.finalize("success")
    pictures = figures(tmp_path / "run")
    assert set(pictures) == {"test/confusion", "test/worst_mistakes"}
    data = FewImages()
    guesses = ImageClassifier(Unsure())(data.images).argmax(1)
    counts = torch.zeros(10, 10, dtype=torch.int64)
    for label, guess in zip(data.labels, guesses, strict=True):
        counts[label, guess] += 1
    assert pictures["test/confusion"].tobytes() == draw_confusion(counts, NAMES).tobytes()


def test_the_worst_mistakes_are_those_with_the_largest_loss(tmp_path: Path) -> None:
    data, model = FewImages(), ImageClassifier(Unsure())
    train = trainer(tmp_path, logger=TensorBoardLogger(tmp_path, name="run", version=""))
    train.test(model, data, verbose=False)
    train.logger.finalize("success")
    logits = model(data.images)
    losses = F.cross_entropy(logits, data.labels, reduction="none")
    losses[logits.argmax(1) == data.labels] = 0
    worst = losses.argsort(descending=True)[:25]
    drawn = draw_mistakes(
        data.images[worst], data.labels[worst].tolist(), logits.argmax(1)[worst].tolist(), NAMES
    )
    assert figures(tmp_path / "run")["test/worst_mistakes"].tobytes() == drawn.tobytes()


def test_a_test_without_mistakes_or_without_a_logger_draws_what_there_is(tmp_path: Path) -> None:
    data = FewImages()
    data.labels = ImageClassifier(Unsure())(data.images).argmax(1)
    train = trainer(tmp_path, logger=TensorBoardLogger(tmp_path, name="run", version=""))
    train.test(ImageClassifier(Unsure()), data, verbose=False)
    train.logger.finalize("success")
    assert set(figures(tmp_path / "run")) == {"test/confusion"}
    assert (
        trainer(tmp_path).test(ImageClassifier(Unsure()), data, verbose=False)[0]["test/accuracy"]
        == 1
    )


def test_every_cell_of_the_confusion_matrix_has_its_place_and_colour() -> None:
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts[3, 3], counts[7, 2] = 5, 1
    before = draw_confusion(torch.zeros(10, 10, dtype=torch.int64), NAMES)
    after = draw_confusion(counts, NAMES)
    cells = (0, 80, before.width, before.height)  # below the title
    left, top, right, bottom = ImageChops.difference(
        before.crop(cells), after.crop(cells)
    ).getbbox() or (0, 0, 0, 0)
    assert round((right - left) / CELL) == 2
    assert round((bottom - top) / CELL) == 5
    red, _, blue = after.getpixel((right - 4, 80 + top + 3))
    assert blue > red + 60
    red, _, blue = after.getpixel((left + 3, 80 + bottom - 4))
    assert red > blue + 60

"""Logging as Lightning teaches it: `self.logger.experiment` in a GAN with two optimizers."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from support.programs import begin, go
from support.small import difference, final_state, rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from savepoint import resumable
from savepoint.checkpoint import store
from savepoint.preemption import Preempted

STOP_AFTER = {"batch": -1}


class PaintedDigits(LightningModule):
    def __init__(self, latent_dim: int = 4, lr: float = 0.002, b1: float = 0.5, b2: float = 0.999):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(latent_dim, 16), nn.ReLU(), nn.Linear(16, 64))
        self.discriminator = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Linear(16, 1))
        self.validation_z = torch.randn(6, latent_dim)
        self.example_input_array = torch.zeros(2, latent_dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z).tanh().view(-1, 1, 8, 8)  # type: ignore[no-any-return]

    def adversarial_loss(self, said: Tensor, real: bool) -> Tensor:
        return F.binary_cross_entropy_with_logits(said, torch.full_like(said, float(real)))

    def training_step(self, batch: Any) -> None:
        images, _ = batch
        of_generator, of_discriminator = self.optimizers()  # type: ignore[attr-defined]
        z = torch.randn(len(images), self.hparams["latent_dim"]).type_as(images)

        self.toggle_optimizer(of_generator)
        self.generated = self(z)
        if self.trainer.fit_loop.total_batch_idx % 4 == 0:
            grid = make_grid(self.generated[:6])
            self.logger.experiment.add_image("train/generated_images", grid, self.current_epoch)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), real=True)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        of_generator.step()
        of_generator.zero_grad()
        self.untoggle_optimizer(of_generator)

        self.toggle_optimizer(of_discriminator)
        real = self.adversarial_loss(self.discriminator(images), real=True)
        fake = self.adversarial_loss(self.discriminator(self(z).detach()), real=False)
        self.log_dict({"d_loss": (real + fake) / 2}, prog_bar=True)
        self.manual_backward((real + fake) / 2)
        of_discriminator.step()
        of_discriminator.zero_grad()
        self.untoggle_optimizer(of_discriminator)
        if self.trainer.fit_loop.total_batch_idx == STOP_AFTER["batch"]:
            os.kill(os.getpid(), signal.SIGTERM)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def on_train_start(self) -> None:
        self.logger.experiment.add_text("began", "once, however often it is resumed", 0)

    def on_train_epoch_start(self) -> None:
        text = f"epoch {self.current_epoch}"
        self.logger.experiment.add_text("epochs", text, self.current_epoch)

    def on_validation_epoch_end(self) -> None:
        grid = make_grid(self(self.validation_z.type_as(self.generator[0].weight)))
        for logger in self.loggers:
            if isinstance(logger.experiment, SummaryWriter):
                logger.experiment.add_image("generated_images", grid, self.current_epoch)
        self.logger.experiment.add_histogram("weights", self.generator[0].weight, self.global_step)

    def configure_optimizers(self) -> Any:
        betas = self.hparams["b1"], self.hparams["b2"]
        parts = self.generator, self.discriminator
        adams = [torch.optim.Adam(one.parameters(), self.hparams["lr"], betas) for one in parts]
        return adams, []


class Noise(LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        self.train, self.val = random_split(TensorDataset(images, torch.zeros(64)), [48, 16])

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(self.train, batch_size=self.batch_size, shuffle=True))

    def val_dataloader(self) -> Any:
        return DataLoader(self.val, batch_size=self.batch_size)


def train(outputs: Path, name: str, stop_after: int = -1) -> Path:
    STOP_AFTER["batch"] = stop_after
    (outputs / "gan.yaml").write_text(
        "model: {class_path: PaintedDigits}\ndata: {class_path: Noise}\n"
        "trainer: {max_epochs: 3, log_every_n_steps: 2}\ncheckpoint: {monitor: null}\n"
    )
    words = ["--config", str(outputs / "gan.yaml"), "--output_dir", str(outputs)]
    assert begin(*words, "--run_name", name) == 0
    return outputs / name


def logged(run: Path) -> dict[str, list[tuple[int, Any]]]:
    """(step, value) of each picture, text and curve in the events."""
    events = EventAccumulator(str(run), {"images": 0, "scalars": 0, "tensors": 0}).Reload()
    tags = events.Tags()
    found = {
        tag: [(one.step, one.encoded_image_string) for one in events.Images(tag)]
        for tag in tags["images"]
    }
    found |= {
        tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in tags["scalars"]
    }
    found |= {
        tag: [(one.step, one.tensor_proto.string_val[0]) for one in events.Tensors(tag)]
        for tag in tags["tensors"]
    }
    return {tag: values for tag, values in found.items() if not tag.startswith("time/")}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("straight"), "gan")


def test_the_logger_of_a_model_is_the_one_that_takes_pictures(straight: Path) -> None:
    seen = logged(straight)
    # One before the training, as Lightning's check of the validation makes it, and one an epoch.
    assert [step for step, _ in seen["generated_images"]] == [0, 0, 1, 2]
    assert [text for _, text in seen["epochs/text_summary"]] == [b"epoch 0", b"epoch 1", b"epoch 2"]
    assert {"g_loss", "d_loss"} <= seen.keys()
    assert {"g_loss", "d_loss"} <= {name for row in rows(straight) for name in row}


def test_a_picture_that_is_kept_with_a_gradient_nobody_can_use_is_exact(straight: Path) -> None:
    latest = store.CheckpointStore(straight / "checkpoints").latest()
    assert latest is not None
    assert latest.manifest["exact"]  # the weights that it went through have been written to
    assert latest.manifest["unsaved"] == []


@pytest.mark.parametrize("batch", [5, 8, 17], ids=["end of an epoch", "inside one", "last batch"])
def test_pictures_stand_once_after_a_resume(tmp_path: Path, straight: Path, batch: int) -> None:
    with pytest.raises(Preempted):
        train(tmp_path, "gan", stop_after=batch)
    STOP_AFTER["batch"] = -1
    assert go(str(tmp_path / "gan")) == 0
    assert list(difference(final_state(straight), final_state(tmp_path / "gan"))) == []
    assert rows(tmp_path / "gan") == rows(straight)
    assert logged(tmp_path / "gan") == logged(straight)


def test_pictures_after_the_checkpoint_stand_once_after_a_kill(
    tmp_path: Path, straight: Path
) -> None:
    run = train(tmp_path, "gan")
    for file in [*(run / "checkpoints").glob("*.ckpt"), run / "summary.json"]:
        if file.name != "step-00000024.ckpt":  # the end of the second epoch: two steps a batch
            file.unlink()
    assert go(str(run)) == 0
    assert logged(run) == logged(straight)

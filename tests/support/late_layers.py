"""Models for the command line whose layers or names are not what the constructor made, and the
config of a short run.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from savepoint import resumable


class Late(LightningModule):
    """Its layers are made in the constructor, in `setup`, in `setup` by the data, or in
    `configure_model`.
    """

    def __init__(
        self, made_in: str = "init", compiled: bool = False, frozen: bool = False, width: int = 4
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.made_in, self.compiled, self.frozen, self.width = made_in, compiled, frozen, width
        self.example_input_array = torch.linspace(-1, 1, 8).view(2, 4)
        self.backbone = nn.Linear(4, 4)
        self.backbone.requires_grad_(not frozen)
        if frozen:
            self.strict_loading = False
            nn.init.eye_(self.backbone.weight)
            nn.init.zeros_(self.backbone.bias)
        if made_in == "init":
            self.make(width)

    def make(self, width: int) -> None:
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 1))
        if self.compiled:
            self.net = torch.compile(self.net, backend="eager")

    def setup(self, stage: str) -> None:
        if self.made_in == "setup":
            self.make(self.width)
        if self.made_in == "data":
            self.make(self.trainer.datamodule.width)

    def configure_model(self) -> None:
        if self.made_in == "configure_model" and not hasattr(self, "net"):
            self.make(self.width)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.frozen:
            for name in [name for name in checkpoint["state_dict"] if name.startswith("backbone.")]:
                del checkpoint["state_dict"][name]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.backbone(x))

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        return (self(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean()

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.log("val/loss", (self(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean())

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self.log("test/loss", (self(batch[0]) - batch[0].sum(1, keepdim=True)).square().mean())
        self.log("test/first", batch[1].float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 0.01)


class Split(LightningDataModule):
    """Its parts are drawn in `setup`, at each stage anew; a sample says its number."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[str, list[int]]] = []

    def setup(self, stage: str) -> None:
        x = torch.rand(40, 4, generator=torch.Generator().manual_seed(3))
        self.width = 4
        self.parts = random_split(TensorDataset(x, torch.arange(40)), [20, 10, 10])
        self.drawn.append((str(stage), list(self.parts[2].indices)))

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(self.parts[0], 5, shuffle=True), seed=3)

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], 5)

    def test_dataloader(self) -> Any:
        return DataLoader(self.parts[2], 5)


def config(folder: Path, **model: Any) -> list[str]:
    """The flags of a run of such a model."""
    text = "seed_everything: 1\nmodel:\n  class_path: support.late_layers.Late\n  init_args:\n"
    text += (
        "".join(f"    {key}: {str(value).lower()}\n" for key, value in model.items())
        or "    made_in: init\n"
    )
    text += "data: {class_path: support.late_layers.Split}\ncheckpoint: {monitor: val/loss, mode: min, keep_last: 9}\n"
    text += "trainer: {max_epochs: 2, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}\n"
    file = folder / "config.yaml"
    file.write_text(text)
    return ["--config", str(file), "--output_dir", str(folder / "outputs"), "--run_name", "run"]

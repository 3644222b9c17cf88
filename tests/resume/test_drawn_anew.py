"""What a start draws without a seed is drawn anew by a resume, which says so."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset, random_split

from savepoint import CheckpointCallback, CheckpointStore, resumable


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(6, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Split(LightningDataModule):
    """A split by the global generator, and noise of its own."""

    def setup(self, stage: str) -> None:
        x = torch.linspace(0, 1, 240).view(40, 6)
        data = TensorDataset(x, x[:, :3])
        self.train, _ = random_split(data, [32, 8])
        self.noise = torch.rand(6)

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(self.train, batch_size=4, shuffle=True))


def fit(directory: Path, seed: int | None, epochs: int, **begin: Any) -> CheckpointStore:
    if seed is None:
        torch.seed()
    else:
        seed_everything(seed)
    saving = CheckpointCallback(monitor=None)
    trainer = Trainer(
        max_epochs=epochs, default_root_dir=directory, callbacks=[saving], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Line(), Split(), **begin)
    return saving.store


@pytest.mark.parametrize("seed", [None, 3])
def test_a_resume_says_what_was_drawn_anew(
    seed: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tmp_path, seed, 1)
    capsys.readouterr()
    after = fit(tmp_path, seed, 2, ckpt_path="last").latest()
    said = capsys.readouterr().out
    assert after is not None
    if seed is None:
        assert "Not exact: data.noise (other numbers than when the training began" in said
        assert after.manifest["exact"] is False
        assert any("data.train.indices" in reason for reason in after.manifest["unsaved"])
    else:
        assert "Not exact" not in said
        assert after.manifest["exact"] is True

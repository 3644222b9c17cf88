"""A training by a launcher that makes its own processes, and a resume of it: see test_ddp_exact.py.

python -m support.spawned STRATEGY DIRECTORY
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything

from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.store import CheckpointStore
from support.small import SmallData, SmallModel


def fit(directory: Path, strategy: str, ckpt_path: Path | None = None) -> dict[str, Any]:
    seed_everything(1, verbose=False)
    callback = CheckpointCallback(monitor="val/loss", mode="min", keep_last=99, save_every_steps=2)
    trainer = Trainer(
        callbacks=[callback], default_root_dir=directory, strategy=strategy, devices=2, accelerator="cpu",
        max_epochs=2, logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    model = SmallModel()
    trainer.fit(model, datamodule=SmallData(), ckpt_path=ckpt_path, weights_only=True)
    assert Path(callback.best_model_path).is_file()
    return model.state_dict()


def main(strategy: str, directory: Path) -> None:
    straight = fit(directory / "straight", strategy)
    file = CheckpointStore(directory / "straight" / "checkpoints").checkpoints()[0]
    assert file.manifest["exact"]
    resumed = fit(directory / "resumed", strategy, file.path)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

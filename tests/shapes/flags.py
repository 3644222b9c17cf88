"""Every flag of the Trainer that changes its loops, alone and a few together."""

from typing import Any

from lightning.pytorch.callbacks import EarlyStopping

from shapes.base import Net, Shape


class Overfits(Net):
    """Must see the same two batches again and again."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[float] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.add(float(batch[0].sum()))
        if len(self.seen) > 2:
            raise ValueError(f"{len(self.seen)} batches, expected 2")
        return super().training_step(batch, batch_idx)


FLAGS = {
    "base": {},
    "accumulate_3": {"accumulate_grad_batches": 3},
    "accumulate_4": {"accumulate_grad_batches": 4},
    "accumulate_across_nothing": {"accumulate_grad_batches": 25},
    "clip_norm": {"gradient_clip_val": 0.1},
    "clip_value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "val_interval_3": {"val_check_interval": 3},
    "val_interval_fraction": {"val_check_interval": 0.25},
    "val_interval_across_epochs": {"val_check_interval": 7, "check_val_every_n_epoch": None},
    "val_interval_beyond_an_epoch": {"val_check_interval": 13, "check_val_every_n_epoch": None},
    "val_every_2_epochs": {"check_val_every_n_epoch": 2},
    "val_interval_every_2_epochs": {"check_val_every_n_epoch": 2, "val_check_interval": 4},
    "limit_train": {"limit_train_batches": 7},
    "limit_train_fraction": {"limit_train_batches": 0.5},
    "limit_val": {"limit_val_batches": 1},
    "no_val": {"limit_val_batches": 0},
    "overfit_2": {"overfit_batches": 2},
    "overfit_fraction": {"overfit_batches": 0.4},
    "max_steps_inside": {"max_steps": 17, "max_epochs": -1},
    "max_steps_at_an_end": {"max_steps": 20, "max_epochs": -1},
    "max_steps_with_val": {"max_steps": 16, "max_epochs": -1, "val_check_interval": 4},
    "min_steps": {"min_steps": 25},
    "sanity_2": {"num_sanity_val_steps": 2},
    "sanity_all": {"num_sanity_val_steps": -1},
    "reload_each_epoch": {"reload_dataloaders_every_n_epochs": 1},
    "reload_every_2": {"reload_dataloaders_every_n_epochs": 2},
    "precision_64": {"precision": "64-true"},
    "precision_bf16_mixed": {"precision": "bf16-mixed"},
    "precision_bf16": {"precision": "bf16-true"},
    "precision_64_accumulate": {"precision": "64-true", "accumulate_grad_batches": 2},
    "anomaly": {"detect_anomaly": True},
    "deterministic": {"deterministic": True},
    "no_inference_mode": {"inference_mode": False},
    "no_distributed_sampler": {"use_distributed_sampler": False},
    "log_every_1": {"log_every_n_steps": 1},
    "log_every_3": {"log_every_n_steps": 3},
    "log_every_50": {"log_every_n_steps": 50},
    "no_logger": {"logger": False},
    "accumulate_val_interval": {"accumulate_grad_batches": 3, "val_check_interval": 5},
    "accumulate_clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05},
    "accumulate_max_steps": {"accumulate_grad_batches": 3, "max_steps": 7, "max_epochs": -1},
    "sanity_val_interval": {"num_sanity_val_steps": 1, "val_check_interval": 3},
    "reload_val_interval": {"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 0.5},
    "one_batch": {"limit_train_batches": 1, "max_epochs": 6},
}
SHAPES = {name: Shape(trainer=arguments) for name, arguments in FLAGS.items()}
SHAPES |= {
    "min_epochs": Shape(
        trainer={"min_epochs": 2},
        callbacks=lambda: [EarlyStopping("val/loss", patience=0, min_delta=9.0)],
    ),
    "overfit_2_the_same": Shape(model=Overfits, trainer={"overfit_batches": 2}),
    "monitored": Shape(checkpointing={"monitor": "val/loss", "mode": "min"}),
    "monitored_val_interval": Shape(
        checkpointing={"monitor": "val/loss", "mode": "min"},
        trainer={"val_check_interval": 3},
    ),
    "saved_by_steps": Shape(checkpointing={"save_every_steps": 3, "save_every_epochs": None}),
    "saved_async": Shape(checkpointing={"async_save": True, "save_every_steps": 4}),
}

"""Every callback of Lightning that runs on a CPU, beside ours."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import callbacks as c
from lightning.pytorch.callbacks import Callback
from torch.optim.swa_utils import get_ema_avg_fn

from shapes.base import Data, Net, Shape, shuffled


class Tunable(Net):
    """With what the finders change."""

    def __init__(self, lr: float = 0.01, batch_size: int = 4) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Sized(Data):
    """Cut as the model says."""

    def train_dataloader(self) -> Any:
        return shuffled(batch_size=self.trainer.lightning_module.batch_size)


class Backboned(Net):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[:2], self.net[2:]

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trainable, lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], [schedule]


class Unfreeze(c.BaseFinetuning):
    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)


class Slow(Callback):
    """Counts, without a state_dict."""

    def __init__(self) -> None:
        self.batches, self.epochs, self.validations = 0, 0, 0

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        self.batches += 1
        module.log("batches", float(self.batches))

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        self.epochs += 1

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        self.validations += 1


class SlowWithState(Slow):
    def state_dict(self) -> dict[str, Any]:
        return {name: vars(self)[name] for name in ("batches", "epochs", "validations")}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)


class RateByCount(Slow):
    """The count decides what is trained."""

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 0.05 / (1 + self.batches + 3 * self.epochs + 5 * self.validations)


class LogsAtStarts(Callback):
    """Writes to the logger itself, at each start there is."""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        trainer.logger.log_metrics({"started": 1.0}, step=trainer.global_step)

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        trainer.logger.log_metrics({"epoch": trainer.current_epoch}, step=trainer.global_step)

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        trainer.logger.log_metrics({"validation": 1.0}, step=trainer.global_step)


class ShrinksWeights(Callback):
    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(0.99)

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        with torch.no_grad():
            module.net[0].bias.add_(0.01)


class DrawsAtStarts(Callback):
    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        module.net[0].bias.data += 0.01 * torch.randn(8)

    def on_validation_epoch_start(self, trainer: Trainer, module: Any) -> None:
        torch.rand(3)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        module.net[2].bias.data += 0.01 * torch.randn(1)


class AveragedByHand(Callback):
    """Averages that stand in the model while it is validated, put there through `.data`."""

    def __init__(self, replaces: bool) -> None:
        self.replaces, self.average, self.kept = replaces, [], []

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:
        self.average = [p.detach().clone() for p in module.parameters()]

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        for average, parameter in zip(self.average, module.parameters(), strict=True):
            average.lerp_(parameter.detach(), 0.1)

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        self.kept = [p.data if self.replaces else p.detach().clone() for p in module.parameters()]
        self._put(module, self.average)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        self._put(module, self.kept)

    def _put(self, module: Any, weights: Any) -> None:
        for weight, parameter in zip(weights, module.parameters(), strict=True):
            if self.replaces:
                parameter.data = weight
            else:
                parameter.data.copy_(weight)


class SlowsAtValidations(Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook
        setattr(self, hook, self.slow)

    def slow(self, trainer: Trainer, *args: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= 0.8


class ReadsGradients(Callback):
    """Of the step before: they stand until they are set to zero."""

    def on_before_zero_grad(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        module.log("norm", sum(norms) if norms else 0.0)


class AtStarts(Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook
        setattr(self, hook, self.halve)

    def halve(self, trainer: Trainer, module: Any) -> None:
        with torch.no_grad():
            module.net[0].weight.mul_(0.5)


class SetsBounds(Callback):
    """Of the loops, in the second epoch."""

    def __init__(self, **bounds: int) -> None:
        self.bounds = bounds

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            vars(trainer.fit_loop).update(self.bounds)


class JoinsLate(Callback):
    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            trainer.callbacks.append(ShrinksWeights())


def counted(model: Any, trainer: Any) -> Any:
    return [dict(vars(k)) for k in trainer.callbacks if isinstance(k, Slow)]


def shape(*make: Callable[[], Callback], **arguments: Any) -> Shape:
    return Shape(callbacks=lambda: [one() for one in make], **arguments)


def doubling(**arguments: Any) -> Callable[[], Callback]:
    settings = {"unfreeze_backbone_at_epoch": 1, "lambda_func": lambda epoch: 1.5, **arguments}
    return lambda: c.BackboneFinetuning(**settings)


def ema(**arguments: Any) -> Callable[[], Callback]:
    return lambda: c.EMAWeightAveraging(decay=0.9, **arguments)


def averaged() -> Callback:
    return c.WeightAveraging(avg_fn=get_ema_avg_fn(0.8))


INTERVAL = {"val_check_interval": 3}
SHAPES = {
    "early_stopping_val": shape(lambda: c.EarlyStopping("val/loss", patience=1, min_delta=0.05)),
    "early_stopping_train": shape(
        lambda: c.EarlyStopping("train/loss_epoch", patience=0, min_delta=0.3),
    ),
    "early_stopping_at_train_end": shape(
        lambda: c.EarlyStopping("train/loss", patience=1, check_on_train_epoch_end=True),
    ),
    "early_stopping_val_interval": shape(
        lambda: c.EarlyStopping("val/loss", patience=2, min_delta=0.2), trainer=INTERVAL,
    ),
    "early_stopping_threshold": shape(
        lambda: c.EarlyStopping("val/loss", stopping_threshold=0.3), trainer=INTERVAL,
    ),
    "rate_monitor": shape(c.LearningRateMonitor),
    "rate_monitor_step": shape(lambda: c.LearningRateMonitor("step", log_momentum=True)),
    "rate_monitor_epoch": shape(lambda: c.LearningRateMonitor("epoch", log_weight_decay=True)),
    "rate_finder": shape(
        lambda: c.LearningRateFinder(num_training_steps=8, early_stop_threshold=None),
        model=Tunable, extra=lambda m, t: m.lr,
    ),
    "batch_size_finder": shape(
        lambda: c.BatchSizeFinder("power", steps_per_trial=1, max_trials=2),
        model=Tunable, data=Sized, trainer={"max_epochs": 2}, extra=lambda m, t: m.batch_size,
    ),
    "accumulation_scheduler": shape(lambda: c.GradientAccumulationScheduler({0: 1, 1: 3})),
    "accumulation_scheduler_2": shape(
        lambda: c.GradientAccumulationScheduler({0: 4, 1: 2, 2: 1}), trainer=INTERVAL,
    ),
    "swa": shape(lambda: c.StochasticWeightAveraging(0.02, swa_epoch_start=1)),
    "swa_late": shape(
        lambda: c.StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=1),
        trainer={"max_epochs": 4},
    ),
    "ema": shape(ema()),
    "ema_val_interval": shape(ema(), trainer=INTERVAL),
    "ema_late": shape(ema(update_starting_at_step=12, update_every_n_steps=2)),
    "weight_averaging": shape(averaged),
    "weight_averaging_accumulate": shape(averaged, trainer={"accumulate_grad_batches": 3}),
    "pruning": shape(lambda: c.ModelPruning("l1_unstructured", amount=0.2)),
    "pruning_lottery": shape(
        lambda: c.ModelPruning("l1_unstructured", amount=0.3, use_lottery_ticket_hypothesis=True),
    ),
    "backbone": shape(doubling(), model=Backboned),
    "backbone_val_interval": shape(
        doubling(backbone_initial_ratio_lr=0.2, should_align=False), model=Backboned, trainer=INTERVAL,
    ),
    "finetuning": shape(Unfreeze),
    "finetuning_accumulate": shape(Unfreeze, trainer={"accumulate_grad_batches": 3}),
    "lambda": shape(lambda: c.LambdaCallback(on_train_epoch_end=lambda t, m: torch.rand(1))),
    "lambda_log": shape(
        lambda: c.LambdaCallback(on_train_batch_end=lambda t, m, *_: m.log("drawn", torch.rand(1))),
    ),
    "timer": shape(lambda: c.Timer({"hours": 1})),
    "timer_step": shape(lambda: c.Timer({"hours": 1}, interval="step")),
    "tqdm": shape(lambda: c.TQDMProgressBar(refresh_rate=5), trainer={"enable_progress_bar": True}),
    "rich": shape(c.RichProgressBar, trainer={"enable_progress_bar": True}),
    "summary": shape(lambda: c.ModelSummary(2), trainer={"enable_model_summary": True}),
    "rich_summary": shape(c.RichModelSummary, trainer={"enable_model_summary": True}),
    "model_checkpoint": shape(lambda: c.ModelCheckpoint(monitor="val/loss", save_top_k=2)),
    "model_checkpoint_steps": shape(lambda: c.ModelCheckpoint(every_n_train_steps=4)),
    "on_exception": shape(lambda: c.OnExceptionCheckpoint("/tmp")),
    "throughput": shape(
        lambda: c.ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]), window_size=5),
        trainer={"log_every_n_steps": 5}, clocks=("train|", "train/", "validate|", "val"),
    ),
    "counter": shape(Slow, extra=counted),
    "counter_val_interval": shape(Slow, extra=counted, trainer=INTERVAL),
    "counter_with_state": shape(SlowWithState, extra=counted),
    "rate_by_count": shape(RateByCount, extra=counted),
    "logs_at_starts": shape(LogsAtStarts),
    "logs_at_starts_val_interval": shape(LogsAtStarts, trainer=INTERVAL),
    "shrinks_weights": shape(ShrinksWeights, trainer=INTERVAL),
    "draws_at_starts": shape(DrawsAtStarts, trainer=INTERVAL),
    "averaged_by_hand": shape(lambda: AveragedByHand(False), trainer=INTERVAL),
    "averaged_by_hand_replaced": shape(lambda: AveragedByHand(True), trainer=INTERVAL),
    "slows_at_validations": shape(
        lambda: SlowsAtValidations("on_validation_start"), trainer=INTERVAL,
    ),
    "slows_after_validations": shape(
        lambda: SlowsAtValidations("on_validation_end"), trainer=INTERVAL,
    ),
    "reads_gradients": shape(ReadsGradients),
    "halves_at_fit_start": shape(lambda: AtStarts("on_fit_start")),
    "halves_at_train_start": shape(lambda: AtStarts("on_train_start")),
    "goes_on_longer": shape(lambda: SetsBounds(max_epochs=4)),
    "shorter_epochs": shape(lambda: SetsBounds(max_batches=6)),
    "joins_late": shape(JoinsLate),
    "many": shape(
        ema(), c.LearningRateMonitor, Slow, lambda: c.EarlyStopping("val/loss", patience=2),
        extra=counted, trainer=INTERVAL,
    ),
}  # fmt: skip

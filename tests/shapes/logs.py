"""Everything `self.log` takes, logged in every hook that allows it, and read back."""

from typing import Any

import torch
import torchmetrics as tm
from lightning.pytorch.callbacks import Callback

from shapes.base import Net, Shape, data, validation


class Logs(Net):
    """Logs the loss once more, with these arguments."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("more", loss.detach(), **self.arguments)
        return loss


class LogsDict(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log_dict({"a": loss, "b": 2 * loss, "c": batch_idx}, on_step=True, on_epoch=True)
        return loss


class LogsSometimes(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx % 4 == 2:
            self.log("sometimes", loss, on_step=True, on_epoch=True)
        return loss


class LogsEverywhere(Net):
    def on_train_start(self) -> None:
        self.log("at/train_start", 1.0)

    def on_train_epoch_start(self) -> None:
        self.log("at/epoch_start", float(self.current_epoch))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.log("at/batch_start", float(batch_idx), on_step=True, on_epoch=True)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.log("at/zero_grad", 1.0)

    def on_after_backward(self) -> None:
        self.log("at/backward", self.net[0].weight.grad.norm(), on_epoch=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("at/batch_end", batch[0].mean(), on_step=True, on_epoch=True, reduce_fx="min")

    def on_train_epoch_end(self) -> None:
        self.log("at/epoch_end", self.net[0].weight.sum())

    def on_validation_start(self) -> None:
        self.log("at/val_start", 1.0)

    def on_validation_epoch_start(self) -> None:
        self.log("at/val_epoch_start", 1.0)

    def on_validation_batch_end(self, *args: Any) -> None:
        self.log("at/val_batch_end", torch.rand(()), on_step=True, on_epoch=True)

    def on_validation_epoch_end(self) -> None:
        self.log("at/val_epoch_end", self.net[0].weight.mean())


class CallbackLogs(Callback):
    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        module.log("callback/epoch", float(trainer.current_epoch))

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.log("callback/batch", module.net[0].bias.sum(), on_step=True, on_epoch=True)

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.log("callback/epoch_end", module.net[0].bias.mean())


class Reads(Net):
    """What was logged decides."""

    def on_train_batch_end(self, *args: Any) -> None:
        last = self.trainer.callback_metrics.get("train/loss_epoch", torch.tensor(1.0))
        step = self.trainer.callback_metrics["train/loss_step"]
        self.net[2].bias.data += 0.001 * (last - step).sign()

    def on_train_epoch_end(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.05 * float(self.trainer.callback_metrics["val/loss"]) / 2


class ReadsLogged(Net):
    def on_train_epoch_start(self) -> None:
        seen = self.trainer.logged_metrics.get("train/loss_epoch", 0.0)
        self.log("before", float(seen))


class SeveralValidations(Net):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/own", self.loss(batch))
        self.log(f"val/{dataloader_idx}", self.loss(batch), add_dataloader_idx=False)
        self.log("val/step", self.loss(batch), on_step=True, on_epoch=True)


class StepCounts(Net):
    """Logs to the logger itself, with counts and steps of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.logger.log_metrics({"own": float(loss)}, step=self.global_step * 2)
        return loss

    def on_train_start(self) -> None:
        self.logger.log_metrics({"started": 1.0}, step=0)

    def on_train_end(self) -> None:
        self.logger.log_metrics({"ended": float(self.global_step)}, step=self.global_step)


class SameMetricTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.error = tm.MeanAbsoluteError()
        self.parts = torch.nn.ModuleDict({"a": tm.MeanMetric(), "b": tm.MaxMetric()})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.error(self(batch[0]), batch[1])
        self.log("error/step", self.error, on_step=True, on_epoch=False)
        self.log("error/epoch", self.error, on_step=False, on_epoch=True)
        for name, part in self.parts.items():
            part.update(batch[1].mean())
            self.log(f"part/{name}", part, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


EPOCH: dict[str, Any] = {"on_step": False, "on_epoch": True}
BOTH: dict[str, Any] = {"on_step": True, "on_epoch": True}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "on_step": {"on_step": True},
    "on_epoch": EPOCH,
    "both": BOTH,
    "prog_bar": {**BOTH, "prog_bar": True},
    "no_logger": {**BOTH, "logger": False},
    "sum": {**EPOCH, "reduce_fx": "sum"},
    "min": {**BOTH, "reduce_fx": "min"},
    "max": {**EPOCH, "reduce_fx": "max"},
    "torch_max": {**EPOCH, "reduce_fx": torch.max},
    "python_max": {**EPOCH, "reduce_fx": max},
    "rank_zero_only": {**EPOCH, "rank_zero_only": True},
    "rank_zero_only_both": {**BOTH, "rank_zero_only": True},
    "rank_zero_only_sum": {**EPOCH, "rank_zero_only": True, "reduce_fx": "sum"},
    "rank_zero_only_step": {"on_step": True, "rank_zero_only": True},
    "sync_dist": {**EPOCH, "sync_dist": True},
    "batch_size": {**EPOCH, "batch_size": 7},
    "enable_graph": {**BOTH, "enable_graph": True},
}
INTERVAL = {"val_check_interval": 3}
VALIDATIONS = data(val=lambda: [validation(), validation(batch_size=6)])
SHAPES = {name: Shape(model=lambda given=given: Logs(**given)) for name, given in ARGUMENTS.items()}
SHAPES |= {
    "dict": Shape(model=LogsDict),
    "sometimes": Shape(model=LogsSometimes),
    "everywhere": Shape(model=LogsEverywhere),
    "everywhere_interval": Shape(model=LogsEverywhere, trainer=INTERVAL),
    "everywhere_every_step": Shape(model=LogsEverywhere, trainer={"log_every_n_steps": 1}),
    "callback": Shape(callbacks=lambda: [CallbackLogs()]),
    "callback_interval": Shape(callbacks=lambda: [CallbackLogs()], trainer=INTERVAL),
    "reads": Shape(model=Reads),
    "reads_logged": Shape(model=ReadsLogged),
    "several_validations": Shape(model=SeveralValidations, data=VALIDATIONS),
    "several_validations_interval": Shape(
        model=SeveralValidations,
        data=VALIDATIONS,
        trainer=INTERVAL,
    ),
    "to_the_logger": Shape(model=StepCounts),
    "same_metric_twice": Shape(model=SameMetricTwice),
    "no_logger_at_all": Shape(model=LogsDict, trainer={"logger": False}),
    "accumulated": Shape(model=LogsDict, trainer={"accumulate_grad_batches": 3}),
}

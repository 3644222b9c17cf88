"""torchmetrics: every public wrapper, list states, compute groups; logged whole or as values."""

from collections.abc import Callable
from typing import Any

import torch
import torchmetrics as tm
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import wrappers as w
from torchmetrics.aggregation import RunningMean, RunningSum
from torchmetrics.classification import BinaryAUROC, BinaryF1Score, BinaryPrecision, BinaryRecall

from shapes.base import Net, Shape

Use = Callable[[Any, Tensor, Tensor], Any]


class Measured(Net):
    """One metric, used in each training step as `use` says."""

    def __init__(self, metric: Any, use: Use) -> None:
        super().__init__()
        self.metric, self.use = metric, use

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        prediction = self(batch[0])
        loss = torch.nn.functional.mse_loss(prediction, batch[1])
        self.use(self, prediction.detach(), batch[1])
        return loss


def by_value(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric.update(prediction, y)
    model.log("value", model.metric.compute())


def forwarded(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.log("value", model.metric(prediction, y))


def as_object(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric(prediction, y)
    model.log("value", model.metric, on_step=True, on_epoch=True)


def at_epoch(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric.update(prediction, y)
    model.log("value", model.metric, on_step=False, on_epoch=True)


def whole(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.log_dict(model.metric(prediction, y), on_step=True, on_epoch=True)


def aggregated(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric.update((prediction - y).abs().mean())
    model.log("value", model.metric.compute())


def aggregated_object(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric((prediction - y).abs().mean())
    model.log("value", model.metric, on_step=True, on_epoch=True)


def binary(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric.update(prediction.sigmoid().flatten(), (y > 2).long().flatten())
    model.log("value", model.metric, on_step=False, on_epoch=True)


def binary_dict(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric.update(prediction.sigmoid().flatten(), (y > 2).long().flatten())
    model.log_dict(model.metric, on_step=False, on_epoch=True)


def classwise(model: Any, prediction: Tensor, y: Tensor) -> None:
    scores = torch.cat([prediction, -prediction], 1)
    model.metric.update(scores, (y > 2).long().flatten())
    model.log_dict(model.metric.compute())


def two_outputs(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric.update(torch.cat([prediction, prediction], 1), torch.cat([y, -y], 1))
    first, second = model.metric.compute()
    model.log_dict({"first": first, "second": second})


def two_tasks(model: Any, prediction: Tensor, y: Tensor) -> None:
    values = {"a": prediction, "b": 2 * prediction}
    model.metric.update(values, {"a": y, "b": y})
    model.log_dict(model.metric.compute())


def min_max(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric.update(prediction, y)
    model.log_dict({f"it/{name}": value for name, value in model.metric.compute().items()})


def bootstrapped(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric.update(prediction, y)
    model.log("value", model.metric.compute()["mean"])


def concatenated(model: Any, prediction: Tensor, y: Tensor) -> None:
    model.metric.update(prediction.flatten())
    model.log("value", model.metric.compute().std(unbiased=False))


class Doubled(w.MetricInputTransformer):
    def transform_pred(self, pred: Tensor) -> Tensor:
        return 2 * pred


class Tracked(Net):
    def __init__(self, tracked: Any) -> None:
        super().__init__()
        self.tracker = w.MetricTracker(tracked)

    def on_train_epoch_start(self) -> None:
        self.tracker.increment()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.tracker.update(self(batch[0]).detach(), batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        best = self.tracker.best_metric()
        values = best if isinstance(best, dict) else {"best": best}
        self.log_dict({f"best/{name}": value for name, value in values.items()})


class ResetByHand(Net):
    def __init__(self, per_epoch: bool) -> None:
        super().__init__()
        self.error, self.per_epoch = tm.MeanAbsoluteError(), per_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.error.update(self(batch[0]).detach(), batch[1])
        if batch_idx % 4 == 3:
            self.log("error", self.error.compute())
            if not self.per_epoch:
                self.error.reset()
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        if self.per_epoch:
            self.log("error/epoch", self.error.compute())
            self.error.reset()


class Validated(Net):
    """Metrics of the validation: a collection, and one that is never reset."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = tm.MetricCollection([tm.MeanSquaredError(), tm.R2Score()], prefix="val/")
        self.best = tm.MinMetric()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.scores.update(self(batch[0]), batch[1])
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        values = self.scores.compute()
        self.best.update(values["val/MeanSquaredError"])
        self.log_dict(values)
        self.log("val/best", self.best.compute())
        self.scores.reset()


class InAList(Net):
    """Metrics that are no sub-modules: kept in a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {"error": tm.MeanAbsoluteError(), "mean": tm.MeanMetric()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.held["error"].update(self(batch[0]).detach(), batch[1])
        self.held["mean"].update(batch[1].mean())
        self.log_dict({name: metric.compute() for name, metric in self.held.items()})
        return super().training_step(batch, batch_idx)


class OwnMetric(tm.Metric):
    """Counts beside its states."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.seen = 0

    def update(self, prediction: Tensor, y: Tensor) -> None:
        self.seen += 1
        self.total += (prediction - y).abs().mean() * self.seen

    def compute(self) -> Tensor:
        return self.total / max(self.seen, 1)


def measured(metric: Callable[[], Any], use: Use, **trainer: Any) -> Shape:
    def states(model: LightningModule, trainer: Trainer) -> Any:
        return [getattr(m, "_update_count", 0) for m in model.modules() if isinstance(m, tm.Metric)]

    return Shape(model=lambda: Measured(metric(), use), trainer=trainer, extra=states)


def precision_and_more(**arguments: Any) -> Any:
    return tm.MetricCollection([BinaryPrecision(), BinaryRecall(), BinaryF1Score()], **arguments)


SHAPES = {
    "as_object": measured(tm.MeanAbsoluteError, as_object),
    "at_epoch": measured(tm.MeanSquaredError, at_epoch),
    "by_value_never_reset": measured(tm.MeanAbsoluteError, by_value),
    "forwarded": measured(tm.MeanAbsoluteError, forwarded),
    "forwarded_accumulate": measured(tm.R2Score, forwarded, accumulate_grad_batches=3),
    "mean": measured(tm.MeanMetric, aggregated),
    "mean_object": measured(tm.MeanMetric, aggregated_object),
    "max": measured(tm.MaxMetric, aggregated),
    "sum_object": measured(tm.SumMetric, aggregated_object),
    "cat": measured(tm.CatMetric, concatenated),
    "running_mean": measured(lambda: RunningMean(window=5), aggregated),
    "running_sum": measured(lambda: RunningSum(window=3), aggregated),
    "running_wrapper": measured(lambda: w.Running(tm.MeanAbsoluteError(), window=4), forwarded),
    "running_val_interval": measured(lambda: RunningMean(5), aggregated, val_check_interval=3),
    "min_max": measured(lambda: w.MinMaxMetric(tm.MeanAbsoluteError()), min_max),
    "tracker": Shape(model=lambda: Tracked(tm.MeanAbsoluteError())),
    "tracker_collection": Shape(
        model=lambda: Tracked(tm.MetricCollection([tm.MeanAbsoluteError(), tm.R2Score()])),
    ),
    "bootstrapper": measured(lambda: w.BootStrapper(tm.MeanAbsoluteError(), 4), bootstrapped),
    "classwise": measured(
        lambda: w.ClasswiseWrapper(tm.classification.MulticlassAccuracy(2, average=None)),
        classwise,
    ),
    "multioutput": measured(lambda: w.MultioutputWrapper(tm.MeanAbsoluteError(), 2), two_outputs),
    "multitask": measured(
        lambda: w.MultitaskWrapper({"a": tm.MeanAbsoluteError(), "b": tm.MeanSquaredError()}),
        two_tasks,
    ),
    "transformer": measured(lambda: Doubled(tm.MeanAbsoluteError()), by_value),
    "lambda_transformer": measured(
        lambda: w.LambdaInputTransformer(tm.MeanAbsoluteError(), lambda p: p + 1),
        by_value,
    ),
    "collection_groups": measured(precision_and_more, binary_dict),
    "collection_no_groups": measured(lambda: precision_and_more(compute_groups=False), binary_dict),
    "collection_values": measured(
        lambda: tm.MetricCollection({"a": tm.MeanAbsoluteError(), "b": tm.R2Score()}),
        whole,
    ),
    "auroc_lists": measured(BinaryAUROC, binary),
    "auroc_never_reset": measured(
        lambda: BinaryAUROC(thresholds=None),
        binary,
        val_check_interval=4,
    ),
    "pearson": measured(tm.PearsonCorrCoef, lambda m, p, y: at_epoch(m, p.flatten(), y.flatten())),
    "reset_by_hand": Shape(model=lambda: ResetByHand(per_epoch=False)),
    "reset_each_epoch": Shape(model=lambda: ResetByHand(per_epoch=True)),
    "validated": Shape(model=Validated),
    "validated_val_interval": Shape(model=Validated, trainer={"val_check_interval": 3}),
    "held_in_a_dict": Shape(model=InAList),
    "own_metric": measured(OwnMetric, by_value),
    "own_metric_object": measured(OwnMetric, as_object),
}

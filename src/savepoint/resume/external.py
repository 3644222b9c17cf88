"""`python resume.py FILE --config ...` with a file of another program: a new run that begins with
the content of the file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import LambdaLR

from savepoint.checkpoint import foreign
from savepoint.checkpoint.state import loops
from savepoint.job import rank
from savepoint.run import Run
from savepoint.training import build
from savepoint.training.execute import execute
from savepoint.weights import load_fitting, of_model, when_made
from savepoint.words import SHARE, show


def start(path: Path, config: Any, config_name: str) -> int:
    """Trains on from an external file, in a new run directory.

    Raises:
        CheckpointForeignError: the file cannot be read safely, or holds no weights.
        ConfigMismatchError: its weights do not fit the config's model.
    """
    content = foreign.read(path)

    def load(model: LightningModule) -> None:
        weights, mapping = of_model(content, model)
        load_fitting(model, weights)
        if mapping and rank() == 0:
            print(mapping, flush=True)

    # Lightning restores its own files: counters, optimizers, schedules, callbacks.
    is_lightnings = content["kind"] == "lightning"
    run = Run.create(config.output_dir, config.run_name, config_name)
    try:
        callbacks = [] if is_lightnings else [_TakeOver(content)]
        training = build.build(config, run, build.Start(callbacks=callbacks))
        when_made(training.trainer, training.model, load)
        print(_summary(path, content), f"New run {show(run.directory)}", sep="\n", flush=True)
        if SHARE.fullmatch((training.checkpointing.monitor or "").split("/")[-1]):
            training.checkpointing.scores.best = as_share(content["best_accuracy"])
        return execute(training, checkpoint=path if is_lightnings else None)
    except BaseException:
        run.discard()
        raise


def as_share(best: float | None) -> float | None:
    """The best accuracy as a share: old scripts save percent."""
    return best / 100 if best is not None and 1 < best <= 100 else best


def _summary(path: Path, content: Mapping[str, Any]) -> str:
    has = {
        "epoch": f"epoch {content['epoch']}",
        "best_accuracy": f"best accuracy {as_share(content['best_accuracy'])}",
        "optimizer": "optimizer",
    }
    taken = ["weights", *(text for key, text in has.items() if content[key] is not None)]
    lacks = [key for key in has if content[key] is None]
    return (
        f"From {path} ({content['kind']}): {', '.join(taken)}. It lacks "
        f"{', '.join([*lacks, 'random states', 'place in the data'])}: the resume is not exact."
    )


class _TakeOver(Callback):
    """Sets Lightning's counters, the optimizer and the schedule to the epoch of the file."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress = trainer.fit_loop.epoch_progress
        for counts in (progress.current, progress.total):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, self.content["epoch"] or 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = self.content["epoch"] or 0
        steps = epochs * -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        loops.set_steps(trainer, steps)
        optimization = trainer.fit_loop.epoch_loop.automatic_optimization
        optimization.optim_progress.optimizer.step.total.completed = steps
        if self.content["optimizer"]:
            trainer.optimizers[0].load_state_dict(self.content["optimizer"])
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                config.scheduler.last_epoch = steps if config.interval == "step" else epochs
                for group, base in zip(
                    config.scheduler.optimizer.param_groups, config.scheduler.base_lrs, strict=True
                ):
                    group["initial_lr"] = base
                _evaluate(config.scheduler)


def _evaluate(scheduler: LambdaLR) -> None:
    """Sets the rates of the schedule's current step, from its base rates and functions."""
    rows = zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    )
    for group, base, factor in rows:
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

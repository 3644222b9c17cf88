"""`python resume.py FILE --config ...` with a file of another program: a new run that takes over
what the file has.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch.optim.lr_scheduler import LambdaLR

from savepoint.checkpoint import foreign
from savepoint.checkpoint.state import loops
from savepoint.resume.overrides import check_shapes, shapes, under_names_of
from savepoint.run import Run
from savepoint.training import build
from savepoint.training.execute import execute
from savepoint.weights import fit_names, when_made
from savepoint.words import show


def start(path: Path, config: Any, config_name: str) -> int:
    """Trains on from a foreign file in a run directory of its own.

    Raises:
        CheckpointForeignError: the file cannot be read safely, or holds no weights.
        ConfigMismatchError: its weights are not those of the config's model.
    """
    found = foreign.read(path)
    # Lightning restores its own files: counters, optimizers, schedules, callbacks.
    whole = found["kind"] == "lightning"
    run = Run.create(config.output_dir, config.run_name, config_name)
    try:
        made = build.build(config, run, build.Start(callbacks=[] if whole else [_TakeOver(found)]))
        when_made(made.trainer, made.model, lambda model: _load(model, found["state_dict"]))
        print(_said(path, found), f"New run {show(run.directory)}", sep="\n", flush=True)
        made.checkpointing.scores.best = as_share(found["best_accuracy"])
        return execute(made, checkpoint=path if whole else None)
    except BaseException:
        run.discard()
        raise


def _load(model: LightningModule, found: Mapping[str, Any]) -> None:
    target = model.state_dict()
    weights = under_names_of(fit_names(found, target), target)
    check_shapes(shapes(weights), target, strict=model.strict_loading)
    model.load_state_dict(weights, strict=model.strict_loading)


def as_share(best: float | None) -> float | None:
    """Old scripts keep percent; what is compared here is a share."""
    return best / 100 if best is not None and 1 < best <= 100 else best


def _said(path: Path, found: Mapping[str, Any]) -> str:
    has = {
        "epoch": f"epoch {found['epoch']}",
        "best_accuracy": f"best accuracy {as_share(found['best_accuracy'])}",
        "optimizer": "optimizer",
    }
    taken = ["weights", *(text for key, text in has.items() if found[key] is not None)]
    lacks = [key for key in has if found[key] is None]
    return (
        f"From {path} ({found['kind']}): {', '.join(taken)}. It lacks "
        f"{', '.join([*lacks, 'random states', 'place in the data'])}: the resume is not exact."
    )


class _TakeOver(Callback):
    """Starts Lightning's counters, the optimizer and the schedule where the file says."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        progress = trainer.fit_loop.epoch_progress
        for counts in (progress.current, progress.total):
            for name in ("ready", "started", "processed", "completed"):
                setattr(counts, name, self.found["epoch"] or 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epochs = self.found["epoch"] or 0
        steps = epochs * -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
        loops.set_steps(trainer, steps)
        trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total.completed = steps
        if self.found["optimizer"]:
            trainer.optimizers[0].load_state_dict(self.found["optimizer"])
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, LambdaLR):
                config.scheduler.last_epoch = steps if config.interval == "step" else epochs
                for group, base in zip(
                    config.scheduler.optimizer.param_groups, config.scheduler.base_lrs, strict=True
                ):
                    group["initial_lr"] = base
                _evaluate(config.scheduler)


def _evaluate(scheduler: LambdaLR) -> None:
    """The rate of the step it stands at, by the functions and base rates it has now."""
    rows = zip(
        scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True
    )
    for group, base, factor in rows:
        group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]

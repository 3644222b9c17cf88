"""The results of a run: summary.json, and the table at its end."""

import shlex
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

import savepoint
from savepoint import weights
from savepoint.checkpoint import store
from savepoint.checkpoint.facts import why_ended
from savepoint.checkpoint.manifest import step_in_name
from savepoint.run import resume_command, test_metrics
from savepoint.training.build import Training
from savepoint.words import metrics, plural, python, show


def summarise(training: Training, steps: int, epochs: int) -> dict[str, Any]:
    trainer = training.trainer
    checkpointing = training.checkpointing
    best_score = checkpointing.scores.best
    best_step = checkpointing.scores.best_step
    tested, state = _best(training)
    results: dict[str, Any] = {}
    has_step = is_overridden("test_step", training.model)
    if has_step and is_overridden("test_dataloader", training.data):
        if state is not None:
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            callbacks.append(weights.Once(lambda model: weights.restore(model, state)))
        results = dict(trainer.test(training.model, datamodule=training.data, verbose=False)[0])
        results["test_metrics"] = list(results)
        limit = trainer.limit_test_batches
        if isinstance(limit, int) or limit != 1.0:  # 1 is a single batch, 1.0 all of them
            results["limit_test_batches"] = limit
    return {
        **results,
        checkpointing.scores.key: best_score,
        "best_step": best_step,
        "epochs": epochs,
        "steps": steps,
        "fit_secs": round(training.meter.fit_secs, 2),
        "wall_secs": round(time.monotonic() - savepoint.STARTED, 2),
        "samples_per_sec": round(training.meter.overall_samples_per_sec),
        "dataset": getattr(training.data, "name", None) or type(training.data).__name__,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "tested_checkpoint": tested,
        "checkpoints": sorted(
            path.name for path in (training.run.directory / "checkpoints").glob("*.ckpt")
        ),
    }


def _best(training: Training) -> tuple[str | None, Mapping[str, Any] | None]:
    """Name and state of the best checkpoint, for the test; the last weights without one."""
    trainer: Any = training.trainer
    best = None if trainer.fast_dev_run else training.checkpointing.store.best()
    if best is None:
        return None, training.last
    sharding = training.checkpointing.saver.sharding
    if sharding is not None:
        return best.path.name, sharding.weights_of(best.path)
    return best.path.name, store.load(best.path)[0]


def table(training: Training, summary: Mapping[str, Any]) -> str:
    directory = show(training.run.directory)
    rows = metrics(test_metrics(summary).items())
    if "limit_test_batches" in summary:
        limit = f"trainer.limit_test_batches {summary['limit_test_batches']}"
        rows.append(("tested on", f"a part of the test data: {limit}"))
    scores = training.checkpointing.scores
    tested = summary["tested_checkpoint"]
    # In a fork the best may be a checkpoint of its parent.
    if tested and scores.best_step is not None and step_in_name(tested) != scores.best_step:
        rows.append(("tested", f"{tested}: the best that is in this run"))
    if scores.best is not None:
        rows.append((f"best {scores.monitor}", f"{scores.best:.4f} at step {scores.best_step}"))
    starts = " over all starts" if training.meter.goes_on else ""
    length = f"{plural(summary['epochs'], 'epoch')}, {plural(summary['steps'], 'step')}"
    time = f"{summary['fit_secs']:.1f} s{starts} ({summary['samples_per_sec']} samples/s)"
    limit = "epochs"
    if why_ended(training.trainer) == "max_steps":
        limit = "steps"
    longer = f"--trainer.max_{limit} {2 * max(summary[limit], 1)}"
    rows += [
        ("data", str(summary["dataset"])),
        ("trained", f"{length} in {time}, this process {summary['wall_secs']:.1f} s"),
        ("run directory", directory),
        ("train longer", f"{resume_command(training.run.directory)} {longer}"),
        ("look at it", training.run.command("-m", "savepoint", "report")),
        ("tensorboard", f"{python()} -m tensorboard.main --logdir {shlex.quote(directory)}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(["", *(f"{name:<{width}}  {value}" for name, value in rows)])

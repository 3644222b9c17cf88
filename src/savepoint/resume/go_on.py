"""A run goes on: in its own directory, as a fork, or rewound."""

import shutil
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from savepoint import files
from savepoint.checkpoint import store
from savepoint.checkpoint.manifest import step_files
from savepoint.config import compose, typed
from savepoint.errors import ConfigError
from savepoint.job import rank
from savepoint.resume.overrides import ApplyOverrides
from savepoint.resume.plan import check_allowed, differences, finished, plan, refuse, refuse_past
from savepoint.resume.request import Request
from savepoint.resume.source import Source, choose, require_facts
from savepoint.run import Run
from savepoint.training import build
from savepoint.training.execute import execute
from savepoint.words import show


def go_on(request: Request, config: Any, run: Run | None) -> int:
    source = choose(request, may_rename=run is not None and rank() == 0)
    if not source.state.get("config"):
        raise ConfigError(
            f"No config in this checkpoint: {source.path}. Expected one. Give the run's: --config "
            "FILE"
        )
    was = typed.dump(typed.parse([], base=source.state["config"]))
    if config is None:
        config = typed.parse(request.overrides, base=source.state["config"])
    changed = differences(was, typed.dump(config))
    require_facts(source)
    check_allowed(request.allow, [*compose.flatten(was), *changed])
    refuse(changed, request.allow)
    if ended := finished(source, changed, request):
        print(ended, flush=True)
        return _complete(run, source, config) if run else 0
    refuse_past(source, config)
    if rank() == 0:
        print(plan(request, source, changed, config), flush=True)
    if request.plan:
        return 0
    rows = source.state.get("logged_rows") or 0
    stepped = source.state["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    begin = build.Start(
        checkpoint=source.path,
        digest=source.manifest["digest"],
        run=source.state["run"],
        keep_rows=rows if run else 0,
        # In a validation the rows of this very step are logged already, those of the validation are
        # not.
        purge_step=(stepped + (source.state["at"] == "validation")) if run else None,
        changed=changed,
        callbacks=[
            ApplyOverrides(source.state, source.manifest, changed, request.allow),
        ],
        begun=[_Rewind(run, source.manifest["step"])] if run and request.rewind else [],
        state=(source.path, source.state),
    )
    run = run or _new_run(request, source)
    path = source.path
    try:
        made = build.build(config, run, begin)
        begin.state = source = None  # type: ignore[assignment]  # as large as the model: the training takes it and lets it go
        return execute(made, checkpoint=path)
    except BaseException:
        run.discard()
        raise


def _complete(run: Run, source: Source, config: Any) -> int:
    """A run that ended and was killed before its summary: the test is still to be made, and nothing
    else.
    """
    if rank() == 0:
        store.CheckpointStore(run.directory / "checkpoints").mend()
    reached = (source.manifest["step"], source.manifest["epoch"])
    if run.summary().get("steps") == reached[0]:
        return 0
    begin = build.Start(checkpoint=source.path, keep_rows=source.state.get("logged_rows") or 0)
    made = build.build(config, run, begin)
    made.last = source.state
    # The step and epoch of the test's log row.
    made.trainer.fit_loop.load_state_dict(source.state["loops"]["fit_loop"])
    for part in (made.checkpointing, made.meter):
        part.load_state_dict(source.state["callbacks"][part.state_key])
    return execute(made, trained=reached)


def _new_run(request: Request, source: Source) -> Run:
    origin = source.state["run"].get("name") or source.path.stem
    suffix = "-fork" if request.fork is not None else ""
    if request.fork and _is_begun(fork := Path(request.output_dir) / request.fork, source):
        return Run.open(fork)
    return Run.create(request.output_dir, request.fork or None, f"{origin}{suffix}")


def _is_begun(fork: Path, source: Source) -> bool:
    """Whether this very fork was begun and killed before its first save: then the same command
    begins it again.
    """
    starts = Run(fork).starts()
    if step_files(fork / "checkpoints") or not starts:
        return False
    parent = starts[-1].get("parent")
    return isinstance(parent, dict) and parent.get("id") == source.state["run"]["id"]


class _Rewind(Checkpoint):
    """Once all fits and training begins, later checkpoints and the log rows go under rewound/:
    nothing is deleted.

    A Checkpoint by name, as Lightning calls those last: after the preflight, which may still
    refuse.
    """

    def __init__(self, run: Run, step: int) -> None:
        self.run = run
        self.step = step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = store.CheckpointStore(self.run.directory / "checkpoints")
        later = checkpoints.latest()
        if not trainer.is_global_zero or later is None or later.step <= self.step:
            return
        aside = (
            self.run.directory
            / "rewound"
            / f"{time.strftime('%Y%m%d-%H%M%S')}-from-step-{later.step}"
        )
        with files.saving(aside):
            files.make_directory(aside)
            if (self.run.directory / "metrics.csv").exists():
                shutil.copy2(self.run.directory / "metrics.csv", aside)
        moved = checkpoints.set_aside_after(self.step, aside)
        print(
            f"Set aside in {show(aside)}: {', '.join(path.name for path in moved)}, metrics.csv",
            flush=True,
        )

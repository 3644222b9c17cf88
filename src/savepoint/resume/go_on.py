"""A run goes on: in its own directory, as a fork, or rewound."""

import shutil
import time
from collections.abc import Mapping
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
from savepoint.resume.overrides import ApplyOverrides, fit_strategy
from savepoint.resume.plan import check_allowed, differences, finished, plan, refuse, refuse_past
from savepoint.resume.request import Request
from savepoint.resume.source import Source, choose, require_facts
from savepoint.run import Run
from savepoint.training import build
from savepoint.training.execute import execute
from savepoint.training.logs import event_files
from savepoint.words import show


def go_on(request: Request, config: Any, run: Run | None) -> int:
    source = choose(request, may_rename=run is not None and rank() == 0)
    if not source.state.get("config"):
        raise ConfigError(
            f"No config in this checkpoint: {source.path}. The run is built from it. Give the "
            "run's: --config FILE"
        )
    of_checkpoint = typed.parse([], base=source.state["config"])
    was = typed.dump(of_checkpoint)
    if config is None:
        config = of_checkpoint
        if request.overrides:
            config = typed.parse(request.overrides, base=source.state["config"])
        fit_strategy(config, request.overrides)
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
    begin = start_from(request, source, changed, run)
    run = run or new_run(request, source)
    path = source.path
    try:
        training = build.build(config, run, begin)
        # The state is as large as the model: only the training holds it from here on, and frees it.
        begin.state = None
        source = None  # type: ignore[assignment]
        return execute(training, checkpoint=path)
    except BaseException:
        run.discard()
        raise


def start_from(
    request: Request, source: Source, changed: Mapping[str, tuple[Any, Any]], run: Run | None
) -> build.Start:
    """The start from a checkpoint: in its own run, or without `run` in a new one."""
    begin = build.Start(
        checkpoint=source.path,
        digest=source.manifest["digest"],
        run=source.state["run"],
        changed=changed,
        threads=source.manifest.get("threads"),
        callbacks=[ApplyOverrides(source.state, source.manifest, changed, request.allow)],
        state=(source.path, source.state),
    )
    if run:
        _count_logged(source, begin)
        begin.begun = [_Rewind(run, source.manifest["step"])] if request.rewind else []
    return begin


def _count_logged(source: Source, begin: build.Start) -> None:
    """How much of the log stands at the checkpoint: what is beyond it, a resume logs again."""
    begin.keep_rows = source.state.get("logged_rows") or 0
    begin.keep_events = source.state.get("events")
    if begin.keep_events is None:  # of version 0.2
        loop = source.state["loops"]["fit_loop"]["epoch_loop.state_dict"]
        # Inside a validation the rows of this very step are logged, those of the validation not.
        in_validation = source.state["at"] == "validation"
        begin.purge_step = loop["_batches_that_stepped"] + in_validation


def _complete(run: Run, source: Source, config: Any) -> int:
    """Tests a run that has ended, and that was killed before its summary."""
    if rank() == 0:
        store.CheckpointStore(run.directory / "checkpoints").mend()
    reached = (source.manifest["step"], source.manifest["epoch"])
    if run.summary().get("steps") == reached[0]:
        return 0
    begin = build.Start(checkpoint=source.path)
    _count_logged(source, begin)
    training = build.build(config, run, begin)
    training.last = source.state
    # For the step and epoch in the test's log row.
    training.trainer.fit_loop.load_state_dict(source.state["loops"]["fit_loop"])
    for part in (training.checkpointing, training.meter):
        part.load_state_dict(source.state["callbacks"][part.state_key])
    return execute(training, trained=reached)


def new_run(request: Request, source: Source) -> Run:
    origin = source.state["run"].get("name") or source.path.stem
    suffix = "-fork" if request.fork is not None else ""
    if request.fork and _is_begun(fork := Path(request.output_dir) / request.fork, source):
        return Run.open(fork)
    return Run.create(request.output_dir, request.fork or None, f"{origin}{suffix}")


def _is_begun(fork: Path, source: Source) -> bool:
    """Whether this very fork was begun, and killed before its first save: the same command begins
    it again.
    """
    starts = Run(fork).starts()
    if step_files(fork / "checkpoints") or not starts:
        return False
    parent = starts[-1].get("parent")
    return isinstance(parent, dict) and parent.get("id") == source.state["run"]["id"]


class _Rewind(Checkpoint):
    """Moves later checkpoints, and a copy of the log, to rewound/ when the training begins.

    A subclass of Checkpoint, as Lightning calls those last: after the preflight, which may still
    refuse.
    """

    def __init__(self, run: Run, step: int) -> None:
        self.run = run
        self.step = step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            set_aside_later(self.run, self.step)


def set_aside_later(run: Run, step: int) -> None:
    """Moves the checkpoints after `step`, and a copy of the log, to rewound/."""
    checkpoints = store.CheckpointStore(run.directory / "checkpoints")
    later = checkpoints.latest()
    if later is None or later.step <= step:
        return
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-from-step-{later.step}"
    aside = run.directory / "rewound" / name
    with files.saving(aside):
        files.make_directory(aside)
        log = [run.directory / "metrics.csv", *event_files(run.directory)]
        for path in filter(Path.exists, log):
            copy = aside / path.relative_to(run.directory)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    moved = checkpoints.set_aside_after(step, aside)
    print(
        f"Set aside in {show(aside)}: {', '.join(path.name for path in moved)}, metrics.csv",
        flush=True,
    )

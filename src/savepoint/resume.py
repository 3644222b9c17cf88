"""Continue a run: choose a checkpoint, compare configs, print the plan, go on."""

import difflib
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer

from savepoint import cli, compose, files, foreign_start, training
from savepoint.checkpoint import store
from savepoint.checkpoint.manifest import step_files
from savepoint.checkpoint.state import environment
from savepoint.choose import Request
from savepoint.errors import CheckpointNotFoundError, ConfigError, ConfigMismatchError
from savepoint.job import rank, requeued, scheduled
from savepoint.overrides import ApplyOverrides
from savepoint.run import Run, default_name, resume_command
from savepoint.words import megabytes, plural, show

# Where the checkpoint of this start is said to ranks that the launcher starts later.
ENVIRONMENT_KEY = "SAVEPOINT_CHECKPOINT"

# What never decides how a run trains: not compared at all.
NOT_COMPARED = ("run_name", "output_dir", "resume", "init_from", "init_strict")
# What changes no step of the trajectory up to where the run would have ended: applied without asking.
FREE = (
    "checkpoint", "data.root", "data.num_workers", "trainer.accelerator", "trainer.barebones", "trainer.default_root_dir",
    "trainer.devices", "trainer.enable_checkpointing", "trainer.enable_model_summary", "trainer.enable_progress_bar",
    "trainer.log_every_n_steps", "trainer.logger", "trainer.max_epochs", "trainer.max_steps", "trainer.max_time",
    "trainer.min_epochs", "trainer.min_steps", "trainer.num_nodes", "trainer.profiler", "trainer.strategy",
)  # fmt: skip


@dataclass
class Source:
    """The checkpoint to continue from, in memory."""

    path: Path
    state: Mapping[str, Any]
    manifest: Mapping[str, Any]
    newest_step: int = 0  # of its run, where a file was named


def start(argv: Sequence[str]) -> int:
    """`python train.py`: a new run, or with `--resume auto | must` and in a requeued job the run of that name."""
    config = cli.parse(argv)
    mode = config.resume or ("auto" if requeued() else "never")
    if mode == "never":
        return training.train(config, argv)
    run_dir = Path(config.output_dir) / (config.run_name or _name_of_job(argv, config, mode))
    if step_files(run_dir / "checkpoints"):
        return _continue(Request(run_dir=run_dir), config)
    if damaged := sorted((run_dir / "checkpoints").glob("*.corrupt")):
        # Starting over would throw the log away, in a requeue loop without anybody noticing.
        raise CheckpointNotFoundError(
            f"Nothing to continue: every checkpoint of {run_dir} is damaged ({', '.join(path.name for path in damaged)}). "
            "Expected one that verifies. Put a copy back, or start under another --run_name.",
            run_dir,
        )
    if mode == "must":
        raise CheckpointNotFoundError(
            f"Nothing to continue: {run_dir} has no checkpoint, and --resume must was given. Expected one. "
            "Start the run with --resume auto.",
            run_dir,
        )
    return training.train(config, argv, reuse=run_dir)


def _name_of_job(argv: Sequence[str], config: Any, mode: str) -> str:
    """The default name is a promise to find the run again only where a scheduler gives every start the same one."""
    name = default_name(compose.config_name(argv))
    why = None if scheduled() else "no run_name"
    if (Path(config.output_dir) / f"{name}-2").exists():
        why = f"this job has more than one, {name} and {name}-2"
    if why:
        raise ConfigError(f"--resume {mode} cannot tell which run is meant: {why}. Expected one. Give --run_name NAME.")
    return name


def resume(request: Request) -> int:
    """`python resume.py`."""
    if request.foreign:
        assert request.file is not None
        config = cli.parse(request.overrides)
        return foreign_start.start(request.file, config, compose.config_name(request.overrides))
    return _continue(request, None)


def _continue(request: Request, config: Any) -> int:
    in_place = request.run_dir is not None and request.fork is None and not request.plan
    run = Run.open(request.run_dir) if in_place and request.run_dir else None
    try:
        return _go_on(request, config, run)
    finally:
        if run:
            run.unlock()


def _go_on(request: Request, config: Any, run: Run | None) -> int:
    source = choose(request, may_rename=run is not None and rank() == 0)
    if not source.state.get("config"):
        raise ConfigError(f"No config in this checkpoint: {source.path}. Expected one. Give the run's: --config FILE")
    was = cli.dump(cli.parse([], base=source.state["config"]))
    if config is None:
        config = cli.parse(request.overrides, base=source.state["config"])
    changed = differences(was, cli.dump(config))
    _require_facts(source)
    check_allowed(request.allow, [*compose.flatten(was), *changed])
    refuse(changed, request.allow)
    if ended := finished(source, changed, request):
        print(ended, flush=True)
        return _complete(run, source, config) if run else 0
    _refuse_past(source, config)
    if rank() == 0:
        print(plan(request, source, changed, config), flush=True)
    if request.plan:
        return 0
    rows = source.state.get("logged_rows") or 0
    stepped = source.state["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"]
    begin = training.Start(
        checkpoint=source.path,
        digest=source.manifest["digest"],
        run=source.state["run"],
        keep_rows=rows if run else 0,
        # In a validation the rows of this very step are logged already, those of the validation are not.
        purge_step=(stepped + (source.state["at"] == "validation")) if run else None,
        changed=changed,
        callbacks=[
            ApplyOverrides(source.state, source.manifest, changed, request.allow),
        ],
        begun=[_Rewind(run, source.manifest["step"])] if run and request.rewind else [],
        state=(source.path, source.state),
    )
    run, path = run or _new_run(request, source), source.path
    try:
        made = training.build(config, run, begin)
        begin.state = source = None  # type: ignore[assignment]  # as large as the model: the training takes it and lets it go
        return training.execute(made, checkpoint=path)
    except BaseException:
        run.discard()
        raise


def choose(request: Request, *, may_rename: bool) -> Source:
    """The checkpoint of a request, verified whole and loaded to the CPU."""
    if rank() and (inherited := os.environ.get(ENVIRONMENT_KEY)):
        request = Request(run_dir=request.run_dir, file=Path(inherited), rewind=True)
    if request.run_dir is None:
        assert request.file is not None
        return Source(request.file, *store.load(request.file))
    checkpoints = store.CheckpointStore(request.run_dir / "checkpoints")
    if request.best:
        best = checkpoints.best()
        if best is None:
            raise CheckpointNotFoundError(
                f"No best checkpoint in {show(request.run_dir)}: none has a value of the monitored metric at its own step. "
                "Expected one. Leave --best away to take the latest.",
                request.run_dir,
            )
        request.file = best.path
    if request.file is None:
        chosen, state, lines = checkpoints.load_latest(lock_holder=may_rename)
        print("\n".join(lines), end="\n" if lines else "", flush=True)
        source = Source(chosen.path, state, chosen.manifest)
    else:
        source = Source(request.file, *store.load(request.file))
        source.newest_step = latest.step if (latest := checkpoints.latest()) else 0
        meant = request.fork is not None or request.rewind or request.plan
        if source.newest_step > source.manifest["step"] and not meant:
            here = show(request.file.absolute())
            raise ConfigMismatchError(
                f"Not the newest checkpoint of its run: {here} is of step {source.manifest['step']}, the run is at "
                f"{source.newest_step}. Expected one of two ways.\n"
                f"  a new run from there:                 {resume_command(request.file)} --fork NAME\n"
                f"  the same run, later files set aside:  {resume_command(request.file)} --rewind"
            )
    os.environ[ENVIRONMENT_KEY] = str(source.path.absolute())
    return source


def _require_facts(source: Source) -> None:
    """Of a file that some other program has sealed: what a resume compares may be missing."""
    needed = ("epoch", "at", "exact", "dataset", "world_size", "device")
    if lacking := [key for key in needed if source.manifest.get(key) is None]:
        raise ConfigError(
            f"Not saved by a training of Savepoint: {source.path}. Its manifest does not say {', '.join(lacking)}; a "
            f"resume compares these. To start from its weights: python train.py --init_from {source.path}"
        )


# -- comparing -------------------------------------------------------------------------------------------------------


def differences(was: str, is_: str) -> dict[str, tuple[Any, Any]]:
    """Config key -> (value in the checkpoint, value now), for the keys that are compared."""
    old, new = compose.flatten(was), compose.flatten(is_)
    keys = [key for key in {**old, **new} if key.split(".")[0] not in NOT_COMPARED]
    return {key: (old.get(key), new.get(key)) for key in keys if not compose.same(old.get(key), new.get(key))}


def is_free(key: str) -> bool:
    return _named(key, FREE)


def _named(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def refuse(changed: Mapping[str, tuple[Any, Any]], allow: Sequence[str]) -> None:
    """Raises ConfigMismatchError for changes of the trajectory that `--allow` does not name."""
    refused = {key: pair for key, pair in changed.items() if not is_free(key) and not _named(key, allow)}
    if refused:
        lines = [f"  {key}: {was} in the checkpoint, {now} now" for key, (was, now) in list(refused.items())[:3]]
        more = f"  and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise ConfigMismatchError(
            "\n".join(
                [
                    "This would train differently from the run that is continued. Expected the values of the checkpoint.",
                    *lines,
                    *([more] if more else []),
                    f"If that is meant: --allow {','.join(refused)}",
                ]
            )
        )


def check_allowed(allow: Sequence[str], keys: Sequence[str]) -> None:
    """Raises ConfigError for a word after `--allow` that names nothing."""
    for name in allow:
        if name not in ("dataset", "world_size", "canary") and not any(_named(key, [name]) for key in keys):
            near = difflib.get_close_matches(name, keys, n=1)
            hint = f"Did you mean {near[0]}?" if near else "The plan (--plan) names what differs."
            raise ConfigError(f"--allow names no key of the config: {name}. Expected one such as model.lr. {hint}")


def finished(source: Source, changed: Mapping[str, tuple[Any, Any]], request: Request) -> str | None:
    """The line for a run that has nothing left to do; None where there is something."""
    ended = source.manifest.get("ended")
    if ended is None or request.fork is not None or request.rewind:
        return None
    limits = {"max_epochs": source.manifest["epoch"], "max_steps": source.manifest["step"]}
    if ended in limits:
        limit = changed.get(f"trainer.{ended}", (None, None))[1]
        if f"trainer.{ended}" in changed and (limit is None or limit < 0 or limit > limits[ended]):
            return None
    elif changed:
        return None
    where = (request.run_dir or source.path).absolute()
    longer = ended if ended in limits else "max_epochs"
    return (
        f"Finished: {show(where)} ended by {ended} at step {source.manifest['step']}, epoch {source.manifest['epoch']}. "
        f"To train longer: {resume_command(where)} --trainer.{longer} {2 * max(1, limits[longer])}"
    )


# -- the plan --------------------------------------------------------------------------------------------------------


def plan(request: Request, source: Source, changed: Mapping[str, tuple[Any, Any]], config: Any) -> str:
    """What is restored, from where, what was overridden, what an override will not change, how much is left."""
    manifest, state = source.manifest, source.state
    verb = "Fork" if request.fork is not None else "Rewind" if request.rewind else "Resume"
    lines = [
        f"{verb} {show((request.run_dir or source.path).absolute())} from {source.path.name}: step {manifest['step']}, "
        f"epoch {manifest['epoch']}, verified{_size(source.path)}",
        f"  restored    {_restored(source, request.allow)}",
    ]
    lines += [f"  overridden  {key}: {was} -> {now}" for key, (was, now) in changed.items()]
    lines += [f"  note        {note}" for note in _notes(request, source, changed, config)]
    if request.plan:
        lines.append(
            f"  then        the data set is compared ({manifest['dataset']['name']} is expected), and the model's outputs"
        )
    lines.append(f"  left        {_left(state, manifest, config)}")
    return "\n".join(lines)


def _size(path: Path) -> str:
    try:
        return f", {megabytes(path.stat().st_size)}"
    except FileNotFoundError:  # it is in memory; a run that trains on has deleted it
        return ""


def _restored(source: Source, allow: Sequence[str]) -> str:
    state = source.state
    parts = ["weights"]
    parts += ["optimizer"] if state["optimizer_states"] else []
    parts += ["schedule"] if state["lr_schedulers"] else []
    if source.manifest["at"]:
        only = f" (with {source.manifest['world_size']} processes only)" if "world_size" in allow else ""
        parts.append(f"random states, metrics, place in the data{only}")
    best = source.manifest.get("best_score")
    parts += [f"best {source.manifest['monitor']} {best:.4f}"] if best is not None else []
    return ", ".join(parts) + _inexact(source.manifest)


def _inexact(manifest: Mapping[str, Any]) -> str:
    if manifest["exact"]:
        return ""
    unsaved = manifest.get("unsaved") or ["as Lightning resumes"]
    return f" (not exact: {'; '.join(unsaved[:3])})"


def _notes(request: Request, source: Source, changed: Mapping[str, tuple[Any, Any]], config: Any) -> list[str]:
    import torch

    manifest, notes = source.manifest, list[str]()
    if source.newest_step > manifest["step"] and request.fork is None and not request.rewind:
        notes.append(
            f"not the newest of its run, which is at {source.newest_step}: it goes on with --fork or --rewind only"
        )
    now = environment(torch.device("cpu"))
    for key in ("versions", "threads"):
        if manifest.get(key) != now[key]:
            notes.append(f"{key} {manifest.get(key)} -> {now[key]}: not bit-equal to a run that was never stopped")
    loop = source.state["loops"]["fit_loop"]
    inside = not loop["epoch_loop.batch_progress"]["is_last_batch"]
    if request.run_dir and request.fork is None:
        run = Run(request.run_dir)
        if run.record_damage():
            notes.append("run.json is damaged: it is set aside once the training begins, and a new record is begun")
        if run.id() not in (None, manifest.get("run_id")):
            notes.append("this checkpoint was made by another run: somebody put it here")
    if "world_size" in request.allow:
        notes.append(
            f"with more or fewer processes than {manifest['world_size']}, random states, metric sums and each rank's place "
            "in the data are not restored; which samples this epoch sees changes, and checkpoints say exact: false until "
            "the next epoch begins"
        )
    if manifest.get("ended") in ("max_steps", "max_time") and inside:
        notes.append("it ended inside an epoch, which counts as done: not what a longer run without the stop would be")
    if "trainer.max_epochs" in changed or "trainer.max_steps" in changed:
        rates = [group["lr"] for optimizer in source.state["optimizer_states"] for group in optimizer["param_groups"]]
        here = f"learning rate is {rates[0]:.3g} here; " if rates else ""
        notes.append(
            f"{here}a schedule that depends on the length is stretched to the new end: "
            "the first line of the training says where it goes on. Not what a run of that length from the start would be"
        )
    if any(key.startswith("data.") for key in changed):
        notes.append("batches come from the data set as it is now; the place in the epoch is kept")
    return notes


def _refuse_past(source: Source, config: Any) -> None:
    for name in ("epoch", "step"):
        limit, reached = getattr(config.trainer, f"max_{name}s"), source.manifest[name]
        if limit is not None and 0 <= limit < reached:
            raise ConfigError(
                f"Past that already: {show(source.path)} is of {name} {reached}, and trainer.max_{name}s is {limit}. "
                f"Expected {reached} or more. Give a larger one, or fork from an earlier checkpoint: --fork NAME"
            )
    _refuse_past_time(source, config)


def _refuse_past_time(source: Source, config: Any) -> None:
    if config.trainer.max_time is None:
        return
    timer = Timer(config.trainer.max_time)
    saved = source.state.get("callbacks", {}).get(timer.state_key, {})
    used = saved.get("time_elapsed", {}).get("train", 0.0)
    limit = timer._duration
    if limit is not None and used >= limit:
        raise ConfigError(
            f"Past that already: {show(source.path)} has trained for {used:.0f} s, and trainer.max_time is "
            f"{config.trainer.max_time}. Expected more than {used:.0f} s. Give a longer one."
        )


def _left(state: Mapping[str, Any], manifest: Mapping[str, Any], config: Any) -> str:
    parts = []
    if (epochs := config.trainer.max_epochs) is not None and epochs >= 0:
        whole = max(0, epochs - manifest["epoch"])
        begun = " (the first of them begun)" if manifest["at"] != "epoch" else ""
        parts.append(f"{plural(whole, 'epoch')}{begun}")
    if config.trainer.max_steps >= 0:
        parts.append(f"{max(0, config.trainer.max_steps - manifest['step'])} steps at most")
    if config.trainer.max_time:
        parts.append(f"until {config.trainer.max_time} of training")
    return ", ".join(parts) or "no limit is set"


# -- going on --------------------------------------------------------------------------------------------------------


def _complete(run: Run, source: Source, config: Any) -> int:
    """A run that ended and was killed before its summary: the test is still to be made, and nothing else."""
    if rank() == 0:
        store.CheckpointStore(run.directory / "checkpoints").mend()
    reached = (source.manifest["step"], source.manifest["epoch"])
    if run.summary().get("steps") == reached[0]:
        return 0
    begin = training.Start(checkpoint=source.path, keep_rows=source.state.get("logged_rows") or 0)
    made = training.build(config, run, begin)
    made.last = source.state
    made.trainer.fit_loop.load_state_dict(source.state["loops"]["fit_loop"])  # the step and epoch of the test's log row
    for part in (made.checkpointing, made.meter):
        part.load_state_dict(source.state["callbacks"][part.state_key])
    return training.execute(made, trained=reached)


def _new_run(request: Request, source: Source) -> Run:
    origin = source.state["run"].get("name") or source.path.stem
    suffix = "-fork" if request.fork is not None else ""
    if request.fork and _is_begun(fork := Path(request.output_dir) / request.fork, source):
        return Run.open(fork)
    return Run.create(request.output_dir, request.fork or None, f"{origin}{suffix}")


def _is_begun(fork: Path, source: Source) -> bool:
    """Whether this very fork was begun and killed before its first save: then the same command begins it again."""
    starts = Run(fork).starts()
    if step_files(fork / "checkpoints") or not starts:
        return False
    parent = starts[-1].get("parent")
    return isinstance(parent, dict) and parent.get("id") == source.state["run"]["id"]


class _Rewind(Checkpoint):
    """Once all fits and training begins, later checkpoints and the log rows go under rewound/: nothing is deleted.

    A Checkpoint by name, as Lightning calls those last: after the preflight, which may still refuse.
    """

    def __init__(self, run: Run, step: int) -> None:
        self.run, self.step = run, step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoints = store.CheckpointStore(self.run.directory / "checkpoints")
        later = checkpoints.latest()
        if not trainer.is_global_zero or later is None or later.step <= self.step:
            return
        aside = self.run.directory / "rewound" / f"{time.strftime('%Y%m%d-%H%M%S')}-from-step-{later.step}"
        with files.saving(aside):
            files.make_directory(aside)
            if (self.run.directory / "metrics.csv").exists():
                shutil.copy2(self.run.directory / "metrics.csv", aside)
        moved = checkpoints.set_aside_after(self.step, aside)
        print(f"Set aside in {show(aside)}: {', '.join(path.name for path in moved)}, metrics.csv", flush=True)

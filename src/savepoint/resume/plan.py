"""The changes of a resume: compares configs, refuses or allows changes, prints the plan. Nothing is
written.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Timer

from savepoint import files, job
from savepoint.checkpoint.promises import promises
from savepoint.checkpoint.state.process import environment
from savepoint.config import compose
from savepoint.errors import ConfigError, ConfigMismatchError
from savepoint.resume.request import Request
from savepoint.resume.source import Source
from savepoint.run import Run, resume_command
from savepoint.training import threads
from savepoint.words import megabytes, plural, show

# Keys without influence on the training: not compared at all.
_LENGTH = {"trainer.max_epochs", "trainer.max_steps"}
_OF_A_START = {"federated.runtime", "federated.client_state_dir"}
NOT_COMPARED = ("run_name", "output_dir", "resume", "init_from", "init_strict", "threads")


# Keys that change no step of the trajectory up to the run's planned end: applied at once.
FREE = (
    "checkpoint",
    "data.root",
    "data.num_workers",
    "federated.min_replies",
    "federated.num_server_rounds",
    "federated.retries",
    "federated.save_client_models",
    "federated.timeout",
    "trainer.accelerator",
    "trainer.barebones",
    "trainer.default_root_dir",
    "trainer.devices",
    "trainer.enable_checkpointing",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
    "trainer.min_epochs",
    "trainer.min_steps",
    "trainer.num_nodes",
    "trainer.profiler",
    "trainer.strategy",
)


def differences(was: str, is_: str) -> dict[str, tuple[Any, Any]]:
    """Config key -> (value in the checkpoint, value now), for the keys that are compared."""
    old = compose.flatten(was)
    new = compose.flatten(is_)
    keys = [key for key in {**old, **new} if key not in _OF_A_START]
    keys = [key for key in keys if key.split(".")[0] not in NOT_COMPARED]
    return {
        key: (old.get(key), new.get(key))
        for key in keys
        if not compose.same(old.get(key), new.get(key))
    }


def is_free(key: str) -> bool:
    return _named(key, FREE)


def _named(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def refuse(changed: Mapping[str, tuple[Any, Any]], allow: Sequence[str]) -> None:
    """Raises ConfigMismatchError for changes of the trajectory that `--allow` does not name."""
    refused = [key for key in changed if not is_free(key) and not _named(key, allow)]
    if not refused:
        return
    lines = ["This would train differently from the run that is continued. A resume repeats it."]
    for key in refused[:3]:
        was, now = changed[key]
        lines.append(f"  {key}: {was} in the checkpoint, {now} now")
    if len(refused) > 3:
        lines.append(f"  and {len(refused) - 3} more")
    lines.append(f"If that is meant: --allow {','.join(refused)}")
    raise ConfigMismatchError("\n".join(lines))


def check_allowed(allow: Sequence[str], keys: Sequence[str]) -> None:
    """Raises ConfigError for a word after `--allow` that names nothing."""
    for name in allow:
        is_key = any(_named(key, [name]) for key in keys)
        if name not in ("dataset", "world_size", "canary", "clients") and not is_key:
            near = difflib.get_close_matches(name, keys, n=1)
            hint = f"Did you mean {near[0]}?" if near else "The plan (--plan) names what differs."
            raise ConfigError(
                f"--allow names no key of the config: {name}. A key is, say, model.lr. {hint}"
            )


def finished(
    source: Source, changed: Mapping[str, tuple[Any, Any]], request: Request
) -> str | None:
    """The line for a run that has nothing left to do; None for any other."""
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
        f"Finished: {show(where)} ended by {ended} at step {source.manifest['step']}, epoch "
        f"{source.manifest['epoch']}. To train longer: {resume_command(where)} --trainer.{longer} "
        f"{2 * max(1, limits[longer])}"
    )


def plan(
    request: Request, source: Source, changed: Mapping[str, tuple[Any, Any]], config: Any
) -> str:
    """The plan in words: what is restored and from where, the overrides, what they do not change,
    and how much is left.
    """
    manifest = source.manifest
    state = source.state
    verb = "Rewind" if request.rewind else "Resume"
    if request.fork is not None:
        verb = "Fork"
    lines = [
        f"{verb} {show((request.run_dir or source.path).absolute())} from {source.path.name}: "
        f"step {manifest['step']}, epoch {manifest['epoch']}, verified{_size(source.path)}",
        f"  restored    {_restored(source, request.allow)}",
    ]
    if manifest["world_size"] > 1 or manifest.get("elastic"):
        lines += [f"  promised    {promise}" for promise in promises(manifest)]
    lines += [f"  overridden  {key}: {was} -> {now}" for key, (was, now) in changed.items()]
    lines += [f"  note        {note}" for note in _notes(request, source, changed, config.threads)]
    if request.plan:
        name = manifest["dataset"]["name"]
        compared = (
            f"the data set ({name}) and the model's outputs" if name else "the model's outputs"
        )
        lines.append(f"  then        {compared} are compared")
    lines.append(f"  left        {_left(state, manifest, config)}")
    return "\n".join(lines)


def _size(path: Path) -> str:
    try:
        return f", {megabytes(files.size(path))}"
    except FileNotFoundError:  # a run that trains has deleted it; its state is in memory
        return ""


def _restored(source: Source, allow: Sequence[str]) -> str:
    state = source.state
    parts = ["weights"]
    parts += ["optimizer"] if state["optimizer_states"] else []
    parts += ["schedule"] if state["lr_schedulers"] else []
    if source.manifest["at"]:
        only = ""
        if "world_size" in allow and not source.manifest.get("elastic"):
            only = f" (with {source.manifest['world_size']} processes only)"
        parts.append(f"random states, metrics, place in the data{only}")
    best = source.manifest.get("best_score")
    parts += [f"best {source.manifest['monitor']} {best:.4f}"] if best is not None else []
    return ", ".join(parts) + inexact(source.manifest)


def inexact(manifest: Mapping[str, Any]) -> str:
    if manifest["exact"]:
        return ""
    unsaved = manifest.get("unsaved") or ["as Lightning resumes"]
    return f" (not exact: {'; '.join(unsaved[:3])})"


def _notes(
    request: Request, source: Source, changed: Mapping[str, tuple[Any, Any]], asked: int | None
) -> list[str]:
    facts = source.manifest
    notes = list(notes_of_source(request, source, asked))
    if "world_size" in request.allow and not facts.get("elastic"):
        notes.append(
            f"with more or fewer processes than {facts['world_size']}, random states, metric "
            "sums and each rank's place in the data are not restored; which samples this epoch "
            "sees changes, and checkpoints say exact: false until the next epoch begins"
        )
    batches = source.state["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    if facts.get("ended") in ("max_steps", "max_time") and not batches["is_last_batch"]:
        notes.append(
            "it ended inside an epoch, which counts as done: not what a longer run without the "
            "stop would be"
        )
    if source.state["lr_schedulers"] and _LENGTH & set(changed):
        optimizers = source.state["optimizer_states"]
        rates = [group["lr"] for optimizer in optimizers for group in optimizer["param_groups"]]
        here = f"learning rate is {rates[0]:.3g} here; " if rates else ""
        notes.append(
            f"{here}a schedule that depends on the length is stretched to the new end: the first "
            "line of the training says where it goes on. Not what a run of that length from the "
            "start would be"
        )
    if any(key.startswith("data.") for key in changed):
        notes.append("batches come from the data set as it is now; the place in the epoch is kept")
    return notes


def notes_of_source(request: Request, source: Source, asked: int | None) -> Iterator[str]:
    """What holds for a resume of any kind of run."""
    facts = source.manifest
    if source.newest_step > facts["step"] and request.fork is None and not request.rewind:
        yield (
            f"not the newest of its run, which is at {source.newest_step}: it goes on with --fork "
            "or --rewind only"
        )
    yield from notes_of_environment(facts, asked)
    if request.run_dir and request.fork is None:
        yield from notes_of_record(Run(request.run_dir), facts)


def notes_of_environment(facts: Mapping[str, Any], asked: int | None) -> Iterator[str]:
    import torch

    now = environment(torch.device("cpu"))
    now["threads"] = threads.chosen(asked, facts.get("threads"), job.local_processes())
    for key in ("versions", "threads", "processor"):
        was = facts.get(key, "unknown")
        if was != now[key]:
            changed = _changed(key, was, now[key])
            yield f"{changed}: not bit-equal to a run that was never stopped"


def _changed(key: str, was: Any, now: Any) -> str:
    if not isinstance(was, Mapping):
        return f"{key} {was} -> {now}"
    names = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return ", ".join(f"{name} {was.get(name)} -> {now.get(name)}" for name in names)


def notes_of_record(run: Run, facts: Mapping[str, Any]) -> Iterator[str]:
    if run.record_damage():
        yield (
            "run.json is damaged: it is renamed once the training begins, and a new record begins"
        )
    if run.id() not in (None, facts.get("run_id")):
        yield "this checkpoint was made by another run: somebody put it here"


def refuse_past(source: Source, config: Any) -> None:
    for name in ("epoch", "step"):
        limit = getattr(config.trainer, f"max_{name}s")
        reached = source.manifest[name]
        if limit is not None and 0 <= limit < reached:
            raise ConfigError(
                f"Past that already: {show(source.path)} is of {name} {reached}, and "
                f"trainer.max_{name}s is {limit}. Expected {reached} or more. Give a larger one, "
                "or fork from an earlier checkpoint: --fork NAME"
            )
    _refuse_past_time(source, config)


def _refuse_past_time(source: Source, config: Any) -> None:
    if config.trainer.max_time is None:
        return
    timer = Timer(config.trainer.max_time)
    saved = source.state.get("callbacks", {}).get(timer.state_key, {})
    used = saved.get("time_elapsed", {}).get("train", 0.0)
    limit = timer.time_remaining()
    if limit is not None and used >= limit:
        raise ConfigError(
            f"Past that already: {show(source.path)} has trained for {used:.0f} s, and "
            f"trainer.max_time is {config.trainer.max_time}. Expected more than {used:.0f} s. Give "
            "a longer one."
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

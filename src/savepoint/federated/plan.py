"""A resume of a federated run, in words: what is compared, restored, left. Nothing is written."""

from collections.abc import Mapping
from typing import Any

from savepoint.config import compose, typed
from savepoint.errors import ConfigError
from savepoint.federated.federation import RUNTIMES, require_flower
from savepoint.federated.state import changed_names
from savepoint.federated.training import federation_of
from savepoint.resume.plan import (
    check_allowed,
    differences,
    inexact,
    notes_of_source,
    refuse,
)
from savepoint.resume.request import Request
from savepoint.resume.source import Source, require_facts
from savepoint.run import Run, resume_command
from savepoint.words import megabytes, number, plural, show

ROUNDS = "federated.num_server_rounds"


def configs(request: Request, source: Source, config: Any) -> tuple[str, Any]:
    """The config of the checkpoint, as text, and the one of this start."""
    was = typed.dump(typed.parse([], base=source.state["config"]))
    if config is None:
        kept = _of_last_start(request)
        config = typed.parse([*kept, *request.overrides], base=source.state["config"])
    require_flower(federation_of(config).runtime)
    return was, config


def _of_last_start(request: Request) -> list[str]:
    """The runtime of the run's last start: its checkpoints are the same on all of them."""
    starts = Run(request.run_dir).starts() if request.run_dir and request.fork is None else []
    runtime = starts[-1].get("runtime") if starts else None
    return ["--federated.runtime", runtime] if runtime in RUNTIMES else []


def changes(
    request: Request, source: Source, was: str, config: Any
) -> Mapping[str, tuple[Any, Any]]:
    """Raises ConfigMismatchError for what would change the trajectory."""
    changed = differences(was, typed.dump(config))
    require_facts(source)
    check_allowed(request.allow, [*compose.flatten(was), *changed])
    refuse(changed, request.allow)
    return changed


def finished(
    request: Request, source: Source, changed: Mapping[str, tuple[Any, Any]]
) -> str | None:
    """The line for a run that has nothing left to do; None for any other."""
    rounds = source.manifest["step"]
    limit = changed.get(ROUNDS, (None, rounds))[1]
    if source.manifest.get("ended") is None or request.fork is not None or request.rewind:
        return None
    if limit > rounds:
        return None
    where = (request.run_dir or source.path).absolute()
    return (
        f"Finished: {show(where)} has played its {plural(rounds, 'round')}. For more of them: "
        f"{resume_command(where)} --{ROUNDS} {2 * rounds}"
    )


def refuse_past(source: Source, config: Any) -> None:
    rounds = source.manifest["step"]
    limit = config.federated.num_server_rounds
    if limit < rounds:
        raise ConfigError(
            f"Past that already: {show(source.path)} is of round {rounds}, and {ROUNDS} is "
            f"{limit}. Expected {rounds} or more. Give a larger one, or fork from an earlier "
            "checkpoint: --fork NAME"
        )


def plan(
    request: Request, source: Source, changed: Mapping[str, tuple[Any, Any]], config: Any
) -> str:
    facts = source.manifest
    total = config.federated.num_server_rounds
    verb = "Rewind" if request.rewind else "Resume"
    if request.fork is not None:
        verb = "Fork"
    where = show((request.run_dir or source.path).absolute())
    size = megabytes(source.path.stat().st_size) if source.path.exists() else "in memory"
    lines = [
        f"{verb} {where} from {source.path.name}: round {facts['step']} of {total}, verified, "
        f"{size}",
        f"  restored    {_restored(source)}",
    ]
    lines += [f"  overridden  {key}: {was} -> {now}" for key, (was, now) in changed.items()]
    lines += [f"  note        {note}" for note in _notes(request, source, config)]
    lines.append(f"  left        {plural(max(0, total - facts['step']), 'round')}")
    return "\n".join(lines)


def _restored(source: Source) -> str:
    saved = source.state["federated"]
    strategy = saved["strategy"]
    parts = ["global model"]
    if strategy["changed"]:
        parts.append(f"{strategy['class']} ({', '.join(changed_names(strategy))})")
    else:
        parts.append(f"{strategy['class']} (without a state)")
    if saved["clients"]:
        parts.append(f"states of {plural(len(saved['clients']), 'client')}, proved by digest")
    best = source.manifest.get("best_score")
    if best is not None:
        parts.append(f"best {source.manifest['monitor']} {number(best)}")
    return ", ".join(parts) + inexact(source.manifest)


def _notes(request: Request, source: Source, config: Any) -> list[str]:
    notes = list(notes_of_source(request, source, config.threads))
    if request.run_dir and request.fork is None:
        notes.append(f"start {len(Run(request.run_dir).starts()) + 1} of the run")
    if "clients" in request.allow:
        notes.append("a client whose state is lost begins anew")
    return notes

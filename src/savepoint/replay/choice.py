"""From which checkpoint of a run a step is replayed, and what stands against an equal replay."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from savepoint import find, record
from savepoint.checkpoint import store
from savepoint.checkpoint.store import Checkpoint
from savepoint.errors import ConfigError
from savepoint.resume.plan import notes_of_environment
from savepoint.resume.source import Source, require_facts
from savepoint.run import Run
from savepoint.words import plural, show


def before(run: Run, step: int) -> Checkpoint:
    """The newest checkpoint from which the step is still to be trained.

    Raises:
        ConfigError: There is none.
    """
    checkpoints = run.store.checkpoints()
    earlier = [one for one in checkpoints if one.step < step]
    if not earlier:
        raise ConfigError(
            f"No checkpoint before step {step}: {show(run.directory)} has those of "
            f"{', '.join(str(one.step) for one in checkpoints) or 'no step'}. A replay begins at "
            "one. Give a later step; checkpoint.keep_every_n_steps keeps more of them."
        )
    return earlier[-1]


def load(path: Path, code_of: Run | None = None) -> Source:
    """Verifies the checkpoint whole.

    Raises:
        ConfigError: It is of a training that cannot be replayed; or Python files have changed since
            the run `code_of` made it.
    """
    source = Source(path, *store.load(path))
    if source.manifest.get("kind") == "federated":
        raise ConfigError(
            f"A federated run: {show(path)}. Its rounds are played by a server and its "
            "clients; a training in one process was expected. Fork it to play them again: python "
            f"resume.py {show(path)} --fork NAME"
        )
    require_facts(source)
    ranks = source.manifest["world_size"]
    if ranks != 1:
        raise ConfigError(
            f"A training of {ranks} processes: {show(path)}. A replay runs in one, and "
            "their batches are not its own. Fork the run under its launcher instead: python "
            f"resume.py {show(path)} --fork NAME"
        )
    if code_of is not None:
        _require_same_code(code_of, source)
    return source


def config_after(run: Run, checkpoint: Checkpoint) -> str | None:
    """What a run was trained with from a checkpoint on, where a resume had changed the config."""
    if not any(start["changed"] and start.get("step") == checkpoint.step for start in run.starts()):
        return None
    later = [one for one in run.store.checkpoints() if one.step > checkpoint.step]
    if later:
        config: str = find.load(later[0].path)[0]["config"]
        return config
    return (run.directory / "config.yaml").read_text()


def reservations(
    run: Run, source: Source, end: int, *, anew: bool = False, resumed: bool = False
) -> Iterator[str]:
    """Why a replay up to step `end` may differ, in words.

    Args:
        anew: It begins at step 0, and takes nothing but the config from the checkpoint.
        resumed: It has the config of a resume there.
    """
    facts: Mapping[str, Any] = source.manifest
    if not facts["exact"] and not anew:
        reasons = facts.get("unsaved") or ["as Lightning resumes"]
        yield f"{source.path.name} is not exact: {'; '.join(reasons[:3])}"
    yield from notes_of_environment(facts, None)
    yield from _changed_code(run, facts["step"])
    for start in run.starts():
        changed = start["changed"]
        step = start.get("step")
        if resumed and step == facts["step"]:
            continue
        if changed and isinstance(step, int) and facts["step"] <= step < end:
            keys = ", ".join(f"{key} {was} -> {now}" for key, (was, now) in changed.items())
            yield f"the run was resumed at step {step} with {keys}; the replay is not"


def _require_same_code(run: Run, source: Source) -> None:
    for changed in _changed_code(run, source.manifest["step"]):
        raise ConfigError(
            f"Other code: {show(run.directory)}: {changed}. The same was expected, as other code "
            "may well train something else. Check that commit out; or, to compare all the same: "
            "--allow-code"
        )


def _changed_code(run: Run, step: int) -> Iterator[str]:
    """What stands in the way of the commit that the run was trained at, if it is not today's."""
    begun = [
        one for one in run.starts() if isinstance(one.get("step"), int) and one["step"] <= step
    ]
    then = begun[-1]["git"] if begun else None
    now = record.git()
    if not then or not now or then.get("commit") == now["commit"]:
        return
    was = str(then.get("commit"))
    names = record.code_changed_since(was)
    at = f"it was trained at commit {was[:7]}"
    if names is None:
        yield f"{at}, which is not known here"
    elif names:
        more = ", ..." if len(names) > 2 else ""
        yield f"{at}, and {plural(len(names), 'file')} changed since: {', '.join(names[:2])}{more}"

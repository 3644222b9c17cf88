"""A federated run from its config to an exit code: new, or going on from a checkpoint."""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from savepoint import weights
from savepoint.checkpoint.store import CheckpointStore
from savepoint.config import typed
from savepoint.errors import (
    ClientStateError,
    ConfigMismatchError,
    FederatedError,
    NonFiniteLossError,
    RunDirectoryError,
)
from savepoint.federated import client_app, clients, plan, ray_runtime, summary
from savepoint.federated.clients import ClientStates
from savepoint.federated.local_grid import LocalGrid
from savepoint.federated.server import Server
from savepoint.preemption import Preempted
from savepoint.resume.go_on import new_run, set_aside_later
from savepoint.resume.overrides import check_canary
from savepoint.resume.request import Request
from savepoint.resume.source import Source, choose
from savepoint.run import Run, resume_command
from savepoint.tail import last_step
from savepoint.training import build
from savepoint.training.build import Start
from savepoint.words import plural, show

Play = Callable[[Server], None]
"""Plays all rounds that are left, on some runtime."""


def play(server: Server) -> None:
    """On the runtime that the config names."""
    if server.federation.runtime == "ray":
        ray_runtime.play(server)
        return
    client_app.use(server.text, server.local)
    try:
        server.run(LocalGrid(client_app.app, server.federation.num_clients))
    finally:
        client_app.use("", None)


def train(config: Any, config_name: str, *, reuse: Path | None = None, how: Play = play) -> int:
    """A new run. `reuse` is a directory that may exist already, of a run that was killed before its
    first checkpoint.
    """
    run = Run.open(reuse) if reuse and reuse.is_dir() else None
    run = run or Run.create(config.output_dir, config.run_name, config_name)
    try:
        training = build.build(config, run)
        if config.init_from:
            strict = config.init_strict
            weights.initialise(training.model, config.init_from, strict=strict)
            print("Weights alone: its rounds begin anew.", flush=True)
        server = Server(training, config, [training.record["id"]])
        print(f"Run {show(run.directory)}", flush=True)
        return _execute(server, Start(), how)
    except BaseException:
        run.discard()
        raise
    finally:
        run.unlock()


def go_on(request: Request, config: Any, run: Run | None, *, how: Play = play) -> int:
    """Goes on from a checkpoint of a server."""
    source = choose(request, may_rename=run is not None)
    was, config = plan.configs(request, source, config)
    changed = plan.changes(request, source, was, config)
    if ended := plan.finished(request, source, changed):
        print(ended, flush=True)
        return _complete(run, source, config) if run else 0
    plan.refuse_past(source, config)
    print(plan.plan(request, source, changed, config), flush=True)
    if request.plan:
        return 0
    begin = _start(source, changed, run)
    origin = request.run_dir
    own = run or new_run(request, source)
    try:
        server = _restored(own, config, source, begin, request.allow)
        if run is None and origin is not None:
            _adopt(server, origin, own.directory)
        _check_states(server)
        if request.rewind:
            set_aside_later(own, server.progress.round)
        return _execute(server, begin, how)
    except BaseException:
        own.discard()
        raise
    finally:
        if run is None:
            own.unlock()


def _start(source: Source, changed: Mapping[str, Any], run: Run | None) -> Start:
    begin = Start(
        checkpoint=source.path,
        digest=source.manifest["digest"],
        run=source.state["run"],
        changed=changed,
        threads=source.manifest.get("threads"),
    )
    if run:
        begin.keep_rows = source.state.get("logged_rows") or 0
        begin.keep_events = source.state.get("events")
    return begin


def _restored(run: Run, config: Any, source: Source, begin: Start, allow: list[str]) -> Server:
    training = build.build(config, run, begin)
    made_by = source.state["run"]
    own = training.record["id"]
    ids = [made_by["id"], *made_by.get("ancestors", [])]
    run_ids = [own, *(one for one in ids if one != own)]
    if len(run_ids) > 1:
        provenance = training.checkpointing.saver.provenance
        provenance.run = {**provenance.run, "ancestors": run_ids[1:]}
    server = Server(training, config, run_ids, allow)
    _compare(server, source, allow)
    server.restore(source.state)
    return server


def _compare(server: Server, source: Source, allow: list[str]) -> None:
    """Raises ConfigMismatchError for other data, other parts of it, or other code."""
    now = getattr(server.training.data, "fingerprint", None)
    saved = source.manifest["dataset"]
    parts = source.state["federated"]["partition"]
    is_other = now != saved["fingerprint"]
    moved = {"federated.partitioner", "federated.num_clients", "federated.test_fraction"}
    meant = any(one == key or one.startswith(f"{key}.") for one in allow for key in moved)
    if not is_other and not meant:
        is_other = parts["sha256"] != server.local.partition.sha256
    if is_other and "dataset" not in allow:
        name = getattr(server.training.data, "name", None)
        raise ConfigMismatchError(
            f"Another data set: {name} ({now}), its parts {server.local.partition.sha256[:12]}. "
            f"The run was trained on {saved['name']} ({saved['fingerprint']}), its parts "
            f"{parts['sha256'][:12]}. A resume goes on with the same samples. Point --data.root "
            "at that data set, or go on with this one: --allow dataset"
        )
    weights.restore(server.training.model, source.state)
    if "canary" not in allow:
        check_canary(server.training.model, source.state)


def _adopt(server: Server, origin: Path, directory: Path) -> None:
    """Gives a fork the states that its checkpoint names, as links."""
    if server.allows_lost or not (origin / clients.FOLDER).is_dir():
        return  # in a deployment clients look for the states of the run before
    roots = [directory / clients.FOLDER, origin / clients.FOLDER]
    for client, version in server.progress.states.items():
        ClientStates(roots, client).adopt(version)


def _check_states(server: Server) -> None:
    """Looks for the states of a simulation before its first round."""
    root = server.training.run.directory / clients.FOLDER
    if server.allows_lost or not root.is_dir():
        return
    for client, version in server.progress.states.items():
        ClientStates([root], client).find(version)


def _execute(server: Server, begin: Start, how: Play) -> int:
    """Plays, tests, sums up. Returns the exit code: 1 where the newest state could not be saved."""
    training = server.training
    server.preflight()
    server.read_tables()
    _record(server, begin)
    if server.progress.round:
        server.write_results()
    try:
        how(server)
        return summary.finish(server)
    except Preempted:
        command = resume_command(training.run.directory)
        try:
            training.run.write_resume_command(command)
        except RunDirectoryError as error:  # the exit code, which names the signal, matters more
            print(error, file=sys.stderr)
        print(f"{_saved(server)} Continue with: {command}", flush=True)
        raise
    except (FederatedError, ClientStateError, NonFiniteLossError) as error:
        error.args = (f"{error}\n{_saved(server)} {_way_on(server)}",)
        raise


def _saved(server: Server) -> str:
    latest = server.saver.store.latest()
    if latest is None:
        return "No round is saved."
    lost = max(0, server.progress.round - latest.step)
    without = f", {plural(lost, 'round')} lost" if lost else ""
    return f"Saved at round {latest.step}{without}."


def _way_on(server: Server) -> str:
    directory = server.training.run.directory
    if server.saver.store.latest() is None:
        return f"Start again, under another --run_name than {directory.name}."
    return f"Go on with: {resume_command(directory)}"


def _record(server: Server, begin: Start) -> None:
    training = server.training
    training.run.record_start(
        training.record,
        typed.dump(server.config),
        checkpoint=begin.checkpoint and begin.checkpoint.name,
        step=server.progress.round,
        parent=dict(begin.run) if begin.run else None,
        changed={key: list(pair) for key, pair in (begin.changed or {}).items()},
        world_size=1,
        took_over=training.run.took_over,
        reached=last_step(training.run.directory / "metrics.csv"),
        runtime=server.federation.runtime,
    )


def _complete(run: Run, source: Source, config: Any) -> int:
    """Tests a run that has ended, and that was killed before its summary."""
    CheckpointStore(run.directory / "checkpoints").mend()
    server = _restored(run, config, source, _start(source, {}, run), ["dataset", "canary"])
    server.write_results()
    if run.summary().get("steps") == source.manifest["step"]:
        return 0
    return summary.finish(server)

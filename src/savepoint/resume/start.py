"""The starts of train.py and resume.py: a new run, or one that goes on."""

import sys
from pathlib import Path
from typing import Any

from savepoint.checkpoint import manifest
from savepoint.checkpoint.manifest import step_files
from savepoint.config import compose, typed
from savepoint.errors import CheckpointNotFoundError, ConfigError, MirrorError
from savepoint.federated import federation
from savepoint.job import rank, requeued, scheduled
from savepoint.mirror.fetch import fetch, has
from savepoint.resume import external
from savepoint.resume.go_on import go_on
from savepoint.resume.request import Request
from savepoint.run import Run, default_name
from savepoint.training.execute import train


def start(composed: compose.Composed) -> int:
    """`python train.py`: a new run, or with `--resume auto | must` and in a requeued job the run of
    that name.
    """
    config = typed.resolve(composed)
    mode = config.resume or ("auto" if requeued() else "never")
    if mode == "never":
        return _train(config, composed.name)
    run_dir = Path(config.output_dir) / (
        config.run_name or _name_of_job(composed.name, config, mode)
    )
    if mirror := config.checkpoint.mirror:
        _fetch_newer(f"{mirror.rstrip('/')}/{run_dir.name}", run_dir.parent)
    if step_files(run_dir / "checkpoints"):
        return _continue(Request(run_dir=run_dir), config)
    if damaged := sorted((run_dir / "checkpoints").glob("*.corrupt")):
        # To start over would throw the log away, and in a requeue loop nobody would notice.
        raise CheckpointNotFoundError(
            f"Nothing to continue: every checkpoint of {run_dir} is damaged "
            f"({', '.join(path.name for path in damaged)}). A damaged file is never loaded. Put a "
            "copy back, or start under another --run_name.",
            run_dir,
        )
    if mode == "must":
        raise CheckpointNotFoundError(
            f"Nothing to continue: {run_dir} has no checkpoint, and --resume must starts no new "
            "run. Start it with --resume auto.",
            run_dir,
        )
    return _train(config, composed.name, reuse=run_dir)


def _train(config: Any, name: str, *, reuse: Path | None = None) -> int:
    if "federated" not in config:
        return train(config, name, reuse=reuse)
    from savepoint.federated import runtime  # Flower is optional

    return runtime.train(config, name, reuse=reuse)


def _fetch_newer(url: str, output_dir: Path) -> None:
    """What the mirror has beyond the run directory, which may be gone. A mirror that is not reached
    holds up only a run that is not here: it would begin anew.
    """
    is_here = bool(step_files(output_dir / url.rpartition("/")[2] / "checkpoints"))
    try:
        if has(url):
            fetch(url, output_dir)
    except MirrorError as error:
        if not is_here:
            raise
        if rank() == 0:
            print(f"{error} Going on with what is here.", file=sys.stderr, flush=True)


def _name_of_job(config_name: str, config: Any, mode: str) -> str:
    """The default name, where a scheduler makes it the same at every start of a job."""
    name = default_name(config_name)
    why = None if scheduled() else "no run_name"
    if (Path(config.output_dir) / f"{name}-2").exists():
        why = f"this job has more than one, {name} and {name}-2"
    if why:
        raise ConfigError(
            f"--resume {mode} cannot tell which run is meant: {why}. Every start must find the "
            "same run. Give --run_name NAME."
        )
    return name


def resume(request: Request) -> int:
    """`python resume.py`."""
    if request.foreign:
        assert request.file is not None
        composed = compose.compose(request.overrides)
        return external.start(request.file, typed.resolve(composed), composed.name)
    return _continue(request, None)


def _continue(request: Request, config: Any) -> int:
    in_place = request.run_dir is not None and request.fork is None and not request.plan
    run = Run.open(request.run_dir) if in_place and request.run_dir else None
    try:
        if _kind(request) != "federated":
            return go_on(request, config, run)
        federation.require_flower()
        from savepoint.federated import runtime

        return runtime.go_on(request, config, run)
    finally:
        if run:
            run.unlock()


def _kind(request: Request) -> str | None:
    """Of the training, by the manifest of any of its checkpoints."""
    if request.file is not None:
        return manifest.read(request.file).get("kind")
    assert request.run_dir is not None
    latest = Run(request.run_dir).latest
    return latest.manifest.get("kind") if latest else None

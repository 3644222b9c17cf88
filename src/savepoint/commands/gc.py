"""`savepoint gc [RUN_DIR]`: the store deletes the checkpoints that the run's retention prunes, as
after a save.

Of a federated run also the states of clients that no checkpoint names any more. The newest and the
best always stay; external and damaged files are never touched. Exit code 1 if a checkpoint that
stays does not verify: then nothing is deleted, as the others may be needed.
"""

import argparse
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from savepoint import files, find, words
from savepoint.checkpoint import manifest
from savepoint.checkpoint.retention import RULES, Retention
from savepoint.checkpoint.store import CheckpointStore
from savepoint.commands import output
from savepoint.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from savepoint.federated import listing
from savepoint.run import Run
from savepoint.words import plural


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        nargs="?",
        help="a run directory; the newest run under outputs/",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would go, and delete nothing"
    )
    for rule in RULES:
        parser.add_argument(
            f"--{rule}", type=int, metavar="N", help="instead of the value in the run's config"
        )


def main(arguments: argparse.Namespace) -> int:
    run = find.run(arguments.run_dir)
    if run.checkpoints == run.directory:
        raise ConfigError(
            f"No run: {run.directory}. A run directory has checkpoints/ in it. Name that one."
        )
    config = _checkpoint_group(run)
    numbers: dict[str, Any] = {}
    for rule in RULES:
        given = getattr(arguments, rule)
        numbers[rule] = config.get(rule) if given is None else given
    retention = Retention(**numbers)
    store = CheckpointStore(
        run.checkpoints, retention=retention, monitor=config.get("monitor"), mode=config["mode"]
    )
    with contextlib.nullcontext() if arguments.dry_run else run.locked():
        rows = _plan(store)
        damaged = [row for row in rows if row["damage"]]
        rows += [] if damaged else _clients(run, store)
        if not damaged and not arguments.dry_run:
            store.commit()
            store.sweep(alone=True)
            for path in (run.directory / row["file"] for row in rows if row["is_client"]):
                with files.saving(path):
                    path.unlink(missing_ok=True)
    if arguments.json:
        output.put_json({"run_dir": run.directory, "dry_run": arguments.dry_run, "files": rows})
    else:
        output.put(_text(rows, retention, dry_run=arguments.dry_run))
    return 1 if damaged else 0


def _checkpoint_group(run: Run) -> Mapping[str, Any]:
    """The group `checkpoint` in the run's config.yaml, else in its newest checkpoint."""
    from savepoint.config.compose import parse_yaml

    for text in _configs(run):
        with contextlib.suppress(ConfigError):
            config = parse_yaml(text, "the config")
            group: Any = config.get("checkpoint") if isinstance(config, dict) else None
            if _is_sound(group):
                return dict(group)
    raise ConfigError(
        f"No config that says what to keep: {run.shown}. It stands in config.yaml and in each "
        "checkpoint of train.py. Put config.yaml back."
    )


def _is_sound(group: Any) -> bool:
    """Whether a start would take this group: a mistake in an edited file must delete nothing."""
    if not isinstance(group, dict) or group.get("mode") not in ("min", "max"):
        return False
    numbers = isinstance(group.get("keep_last"), int) and isinstance(group.get("keep_best"), int)
    return numbers and all(isinstance(group.get(rule), int | None) for rule in RULES)


def _configs(run: Run) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        yield (run.directory / "config.yaml").read_text()
    if run.latest is not None:
        yield find.load(run.latest.path)[0].get("config") or ""


def _plan(store: CheckpointStore) -> list[dict[str, Any]]:
    """Each file of the directory with the reason why it stays; `goes` where there is none."""
    kept = store.reasons()
    listed = store.checkpoints()
    everything = Retention(keep_last=len(listed), keep_best=len(listed))
    places = CheckpointStore(
        store.directory, retention=everything, monitor=store.monitor, mode=store.mode
    ).reasons()
    rows = []
    for one in listed:
        if one.step in kept:
            rows.append(_row(one.path, one.step, why=kept[one.step], damage=_damage(one.path)))
        else:
            why = ["no rule", *places.get(one.step, [])]
            rows.append(_row(one.path, one.step, goes=True, why=why))
    rows += [_row(path, why=["does not verify, never deleted"]) for path, _ in store.rejected()]
    for name, what in (("last.ckpt", "the newest"), ("best.ckpt", "the best")):
        if (store.directory / name).exists():
            rows.append(_row(store.directory / name, why=[f"the name of {what}"]))
    known = {row["file"] for row in rows}
    for path in sorted(store.directory.iterdir()):
        if path.name in known or path.name in ("last.ckpt", "best.ckpt"):
            continue
        if files.is_stale_temp(path, alone=True):
            rows.append(_row(path, goes=True, why=["left by a process that died"]))
        else:
            what = "quarantined" if path.name.endswith(".corrupt") else "not a checkpoint"
            rows.append(_row(path, why=[what]))
    return rows


def _clients(run: Run, store: CheckpointStore) -> list[dict[str, Any]]:
    """The states of clients that no checkpoint that stays names."""
    is_federated = run.latest is not None and run.latest.manifest.get("kind") == "federated"
    if not is_federated or listing.summary(run.directory) is None:
        return []
    kept = store.reasons()
    paths = (one.path for one in store.checkpoints() if one.step in kept)
    rows = []
    for path in listing.orphans(run.directory, paths):
        row = _row(path, goes=True, why=["no checkpoint names it"])
        rows.append(row | {"file": str(path.relative_to(run.directory)), "is_client": True})
    return rows


def _row(
    path: Path,
    step: int | None = None,
    *,
    why: list[str],
    goes: bool = False,
    damage: str | None = None,
) -> dict[str, Any]:
    size = find.size(path) or 0
    row = {"file": path.name, "step": step, "bytes": size, "is_client": False}
    return row | {"goes": goes, "why": why, "damage": damage}


def _damage(path: Path) -> str | None:
    try:
        manifest.verify(path)
    except CheckpointNotFoundError:  # deleted by the run, while this is a dry run
        return None
    except CheckpointError:
        return manifest.diagnose(path)
    return None


def _text(rows: list[dict[str, Any]], retention: Retention, *, dry_run: bool) -> str:
    numbers = {rule: getattr(retention, rule) for rule in RULES}
    rules = ", ".join(f"{rule} {value}" for rule, value in numbers.items() if value is not None)
    lines = [
        (row["file"], words.megabytes(row["bytes"]), _fate(row), ", ".join(row["why"]))
        for row in rows
    ]
    gone = [row for row in rows if row["goes"]]
    total = f"{plural(len(gone), 'file')}, {words.megabytes(sum(row['bytes'] for row in gone))}"
    if any(row["damage"] for row in rows):
        last = "Nothing is deleted: a file that stays does not verify, so the others may be needed."
    else:
        last = f"Would delete {total}." if dry_run else f"Deleted {total}."
    return "\n".join([rules, words.table(("file", "size", "", "why"), lines), last])


def _fate(row: dict[str, Any]) -> str:
    if row["damage"]:
        return f"DAMAGED: {row['damage']}"
    return "goes" if row["goes"] else "stays"

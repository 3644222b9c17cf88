"""Federated runs of a few seconds, as processes of their own, and kills at each place of a round."""

import csv
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from savepoint import commands
from savepoint.checkpoint import store
from savepoint.checkpoint.manifest import verify
from support.forked import Program, run

ROUNDS = 4
TINY = [
    "--config", "configs/federated/digits.yaml", "--federated.num_server_rounds", str(ROUNDS),
    "--federated.num_clients", "5", "--federated.fraction_train", "0.6", "--trainer.limit_train_batches", "2",
    "--model.net.width", "4", "--trainer.limit_val_batches", "2",
]  # fmt: skip
VARIANTS = {
    "FedAvg": [],
    "FedAdam": ["--federated.strategy", "FedAdam", "--federated.strategy.eta", "0.01"],
    "FedYogi": ["--federated.strategy", "FedYogi", "--federated.strategy.eta", "0.01"],
    "FedAvgM": ["--federated.strategy", "FedAvgM", "--federated.strategy.server_momentum", "0.5"],
    "head": ["--federated.personal", "[net.classify]"],
    "head and optimizer": [
        "--federated.personal", "[net.classify]", "--federated.keep_optimizer", "true",
        "--federated.strategy", "FedAdam", "--federated.strategy.eta", "0.01",
    ],
    "every second round": [
        "--federated.personal", "[net.classify]", "--checkpoint.save_every_epochs", "2",
        "--checkpoint.monitor", "null",
    ],
}  # fmt: skip
PLACES = (
    "before a client trains",
    "after a client has saved",
    "before the server saves",
    "before the seal",
    "before the commit",
    "before the results",
    "after the save",
)


def train(
    directory: Path, *flags: str, before: Callable[[], None] | None = None
) -> tuple[int, str]:
    """A run in `directory`; exit code and output."""
    where = ["--output_dir", str(directory.parent), "--run_name", directory.name]
    command = ["train.py", *TINY, *where, *flags]
    return run(command, directory.with_suffix(".log"), before)


def resume(
    directory: Path, *flags: str, before: Callable[[], None] | None = None
) -> tuple[int, str]:
    return run(["resume.py", str(directory), *flags], directory.with_suffix(".log"), before)


def killed(directory: Path, flags: Sequence[str], place: str, number: int) -> None:
    """A run that was killed in round `number`."""
    where = ["--output_dir", str(directory.parent), "--run_name", directory.name]
    command = ["train.py", *TINY, *where, *flags]
    at = {"KILLED_AT": place, "KILLED_IN": str(number)}
    with Program(command, directory.with_suffix(".log"), die, **at) as program:
        assert program.wait() == -signal.SIGKILL, program.said


def die() -> None:
    """In the process that is to die: watches for the place in the environment."""
    place, number = os.environ["KILLED_AT"], int(os.environ["KILLED_IN"])
    WATCHED[place](number)


def _strike(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _patch(
    owner: Any,
    name: str,
    before: Callable[..., Any] | None,
    after: Callable[..., Any] | None = None,
) -> None:
    real = getattr(owner, name)

    def patched(*args: Any, **named: Any) -> Any:
        if before and before(*args, **named):
            _strike()
        result = real(*args, **named)
        if after and after(*args, **named):
            _strike()
        return result

    setattr(owner, name, patched)


def _a_client(number: int) -> None:
    from savepoint.federated.training import LocalTraining

    asked = []

    def is_second(local: Any, client: int, server_round: int, *_: Any, **__: Any) -> bool:
        if server_round == number:
            asked.append(client)
        return len(asked) == 2

    _patch(LocalTraining, "train", is_second)


def _a_saved_client(number: int) -> None:
    from savepoint.federated import client_app

    asked = []

    def is_second(order: Any, *_: Any) -> bool:
        if order.server_round == number:
            asked.append(order.client)
        return len(asked) == 2

    _patch(client_app, "_save", None, is_second)


def _a_save(number: int) -> None:
    from savepoint.federated.saver import RoundSaver

    _patch(RoundSaver, "save", lambda saver, server_round, *_: server_round == number)


def _a_seal(number: int) -> None:
    from savepoint.checkpoint.archive import Archive

    _patch(
        Archive,
        "seal",
        lambda archive, facts: facts.get("kind") == "federated" and facts["step"] == number,
    )


def _a_commit(number: int) -> None:
    from savepoint.checkpoint.store import CheckpointStore

    _patch(CheckpointStore, "commit", lambda checkpoints: checkpoints.path(number).exists())


def _results(number: int) -> None:
    from savepoint.federated import results

    _patch(results, "write", lambda directory, history, *_: len(history) == number)


def _a_whole_save(number: int) -> None:
    from savepoint.federated.saver import RoundSaver

    _patch(RoundSaver, "save", None, lambda saver, server_round, *_: server_round == number)


WATCHED: dict[str, Callable[[int], None]] = dict(
    zip(
        PLACES,
        (_a_client, _a_saved_client, _a_save, _a_seal, _a_commit, _results, _a_whole_save),
        strict=True,
    )
)


# -- equality ------------------------------------------------------------------------------------


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if not k.startswith("time/")}
            for row in csv.DictReader(file)
        ]


def newest(directory: Path) -> Path:
    return sorted((directory / "checkpoints").glob("step-*.ckpt"))[-1]


def assert_equal(one: Path, other: Path) -> None:
    """Every value of the newest checkpoints, the logs, the results, and the states that they name."""
    assert commands.main(["diff", str(one), str(other)]) == 0
    for name in ("results.json", "clients.json", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rows(one) == rows(other)
    state, _ = store.load(newest(one))
    for directory in (one, other):
        for client, version in state["federated"]["clients"].items():
            file = directory / f"clients/partition-{client:05d}/step-{version['round']:08d}.ckpt"
            assert verify(file)["digest"] == version["digest"]
        assert list(directory.rglob("*.tmp-*")) == []

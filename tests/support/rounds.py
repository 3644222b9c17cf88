"""Federated runs in this very process, on grids that lose, fail or refuse. Needs Flower."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Error, Message

import project  # noqa: F401
from savepoint.config import typed
from savepoint.federated import client_app, runtime
from savepoint.federated.local_grid import LocalGrid
from savepoint.federated.server import Server
from savepoint.resume.request import requested
from savepoint.run import Run
from support.federated import TINY

KEEPS = ["--federated.personal", "[net.classify]", "--federated.keep_optimizer", "true"]
Spoil = Callable[[Message, Message], Message | None]
"""From a message and its reply to what arrives; None for nothing."""


class SpoiltGrid(LocalGrid):
    """Loses or spoils replies.

    Attributes:
        asked: (kind of message, client, round) of each that was sent.
    """

    def __init__(self, num_clients: int, spoil: Spoil) -> None:
        super().__init__(client_app.app, num_clients)
        self.spoil = spoil
        self.asked: list[tuple[str, int, int]] = []

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        messages = list(messages)
        for one in messages:
            if one.metadata.message_type != "query.partition":
                number = int(one.metadata.group_id)
                self.asked.append((one.metadata.message_type, one.metadata.dst_node_id - 1, number))
        replies = list(super().send_and_receive(messages, timeout=timeout))
        spoilt = (self.spoil(one, reply) for one, reply in zip(messages, replies, strict=False))
        return [reply for reply in spoilt if reply is not None]


def error(message: Message) -> Message:
    return Message(Error(code=3, reason="RuntimeError: out of luck"), reply_to=message)


def is_of(message: Message, kind: str, number: int) -> bool:
    return message.metadata.message_type == kind and message.metadata.group_id == str(number)


def on(grid: Callable[[Server], LocalGrid]) -> runtime.Play:
    def play(server: Server) -> None:
        client_app.use(server.text, server.local)
        server.run(grid(server))

    return play


def spoilt(spoil: Spoil, grids: list[SpoiltGrid] | None = None) -> runtime.Play:
    def grid(server: Server) -> LocalGrid:
        made = SpoiltGrid(server.federation.num_clients, spoil)
        (grids if grids is not None else []).append(made)
        return made

    return on(grid)


def train(directory: Path, *flags: str, how: runtime.Play = runtime.play) -> int:
    where = ["--output_dir", str(directory.parent), "--run_name", directory.name]
    return runtime.train(typed.parse([*TINY, *where, *flags]), "digits", how=how)


def resume(directory: Path, *flags: str, how: runtime.Play = runtime.play) -> int:
    request = requested([str(directory), *flags])
    assert request is not None
    in_place = request.fork is None and not request.plan
    run = Run.open(request.run_dir) if in_place and request.run_dir else None
    try:
        return runtime.go_on(request, None, run, how=how)
    finally:
        if run:
            run.unlock()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose clients keep a head and an optimizer."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    assert train(directory, *KEEPS) == 0
    return directory


def history(directory: Path) -> list[dict[str, Any]]:
    import json

    found: list[dict[str, Any]] = json.loads((directory / "results.json").read_text())
    return found

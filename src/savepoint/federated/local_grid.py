"""Flower's grid in this very process: each message is answered by the ClientApp at once. No Ray, no
sockets, no copies.

What Flower leaves to its own runtimes stands here alone: the identity of the task, and the ids of
messages. tests/federated/test_local_grid.py says when a release moves one of them.
"""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import itertools
import time
import traceback
from collections.abc import Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

FAILED = 3
"""Flower's own code of an error that a ClientApp has raised."""


class LocalGrid(Grid):
    """A grid of so many clients, numbered from 1 on; client n has the partition n - 1.

    A client that is slow cannot be interrupted: after `timeout` seconds those that were not asked
    yet are left out.
    """

    def __init__(self, client_app: ClientApp, num_clients: int) -> None:
        self.client_app = client_app
        self.num_clients = num_clients
        self._numbers = itertools.count(1)
        self._run = Run.create_empty(run_id=1)
        self._replies: dict[str, Message] = {}
        self._shown = False
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = 1
        TaskIdentity.node_id = 1

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(
            content=content,
            message_type=message_type,
            dst_node_id=dst_node_id,
            group_id=group_id,
            ttl=ttl,
        )

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names = []
        for message in messages:
            name = self._named(message)
            self._replies[name] = self._answer(message)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        until = None if timeout is None else time.monotonic() + timeout
        replies = []
        for message in messages:
            if until is not None and time.monotonic() >= until:
                break
            self._named(message)
            replies.append(self._answer(message))
        return replies

    def _named(self, message: Message) -> str:
        name = str(next(self._numbers))
        metadata: Any = message.metadata
        metadata.__dict__["_message_id"] = name
        return name

    def _answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = Context(
            run_id=1,
            node_id=node,
            node_config={"partition-id": node - 1, "num-partitions": self.num_clients},
            state=RecordDict(),
            run_config={},
        )
        try:
            return self.client_app(message, context)
        except Exception as error:  # noqa: BLE001 - as Flower's own runtimes do
            if not self._shown:  # the server tells only what was raised
                self._shown = True
                traceback.print_exc()
            text = f"{type(error).__name__}: {error}"
            return Message(Error(code=FAILED, reason=text), reply_to=message)

"""Asking clients: who is connected, which replies came, what is done about those that did not."""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from savepoint.errors import ClientStateError, FederatedError
from savepoint.federated import messages
from savepoint.federated.federation import Federation
from savepoint.federated.messages import Answer, Order
from savepoint.federated.strategy import Sent
from savepoint.words import plural

LOOK_SECS = 0.5  # between two looks at who is connected


@dataclass
class Replies:
    """Of one question to several clients.

    Attributes:
        good: In the order of the clients.
        answers: Of those that replied well.
        failures: Client and reason of each that did not.
    """

    good: list[Sent] = field(default_factory=list)
    answers: dict[int, Answer] = field(default_factory=dict)
    failures: dict[int, str] = field(default_factory=dict)


class Clients:
    """Flower's nodes as clients: each node is asked once which part of the data it has."""

    def __init__(self, grid: Grid, federation: Federation) -> None:
        self.grid = grid
        self.federation = federation
        self._client_of: dict[int, int | None] = {}  # None for a node without a part of ours

    def ask(self, server_round: int, sent: list[Sent], order: Callable[[int], Order]) -> Replies:
        """Sends each client its message and order; asks again those that failed, as long as too
        few have replied.

        Raises:
            FederatedError: Too few are connected, or have replied.
            ClientStateError: A client refuses, as its state is not that of the checkpoint.
        """
        waiting = dict(sent)
        needed = self.federation.replies_needed(len(waiting))
        replies = Replies()
        good: dict[int, Message] = {}
        for _ in range(self.federation.retries + 1):
            nodes = self._connected(set(waiting), needed - len(good))
            batch = [
                _addressed(message, nodes[client], server_round, order(client))
                for client, message in waiting.items()
                if client in nodes
            ]
            replies.failures = dict.fromkeys(waiting, "no reply")
            for reply in self.grid.send_and_receive(batch, timeout=self.federation.timeout):
                self._sort(reply, good, replies)
            waiting = {client: one for client, one in waiting.items() if client not in good}
            if len(good) >= needed:
                break
        replies.good = sorted(good.items())
        _keep_common_metrics([message for _, message in replies.good])
        if len(good) < needed:
            raise FederatedError(
                f"Too few replies in round {server_round}: {len(good)} of {len(sent)}, after "
                f"{plural(self.federation.retries + 1, 'attempt')}. Expected {needed} or more. "
                f"{_reasons(replies.failures)}"
            )
        return replies

    def _sort(self, reply: Message, good: dict[int, Message], replies: Replies) -> None:
        client = self._client_of.get(reply.metadata.src_node_id)
        if client is None:
            return
        if reply.has_error():
            replies.failures[client] = _first_line(reply.error.reason or "")
            return
        answer = Answer.of(reply.content)
        if answer.outcome == "refused":
            raise ClientStateError(answer.text)
        if answer.outcome == "failed":
            replies.failures[client] = answer.text
            return
        good[client] = reply
        replies.answers[client] = answer
        replies.failures.pop(client, None)

    def _connected(self, wanted: set[int], least: int) -> Mapping[int, int]:
        """Client and node of each that is connected: all that are wanted or, after `timeout`
        seconds, so many of them.
        """
        until = time.monotonic() + self.federation.timeout
        said = False
        while True:
            here = self._look()
            enough = len(here) >= self.federation.min_available_nodes
            if enough and wanted <= here.keys():
                return here
            if time.monotonic() >= until:
                break
            if not said:
                said = True
                print(f"Waiting for clients: {len(here)} connected.", flush=True)
            time.sleep(LOOK_SECS)
        there = len(wanted & here.keys())
        if enough and there >= least:
            return here
        raise FederatedError(
            f"Too few clients are connected: {len(here)} in {self.federation.timeout:.0f} s, "
            f"{there} of the {len(wanted)} that are asked. Expected "
            f"{self.federation.min_available_nodes} (federated.min_available_nodes) and {least} of "
            "those that are asked. Start more, or wait longer: --federated.timeout SECS"
        )

    def _look(self) -> dict[int, int]:
        nodes = list(self.grid.get_node_ids())
        new = [node for node in nodes if node not in self._client_of]
        if new:
            kind = "query.partition"
            queries = [Message(RecordDict(), dst_node_id=node, message_type=kind) for node in new]
            for reply in self.grid.send_and_receive(queries, timeout=self.federation.timeout):
                if not reply.has_error():
                    self._place(reply)
        known = ((self._client_of.get(node), node) for node in nodes)
        return {client: node for client, node in known if client is not None}

    def _place(self, reply: Message) -> None:
        client = int(reply.content[messages.RECORD]["partition"])  # type: ignore[arg-type]
        known = 0 <= client < self.federation.num_clients
        self._client_of[reply.metadata.src_node_id] = client if known else None
        if not known:
            print(
                f"A client without a part: its partition-id is {client}, and federated.num_clients "
                f"is {self.federation.num_clients}. It is not asked.",
                flush=True,
            )


def _keep_common_metrics(replies: list[Message]) -> None:
    """What not all have measured has no mean: a metric that is logged every so many steps, say."""
    records = [record for reply in replies for record in reply.content.metric_records.values()]
    if not records:
        return
    common = set(records[0]).intersection(*records)
    for record in records:
        for name in set(record) - common:
            del record[name]


def _addressed(message: Message, node: int, server_round: int, order: Order) -> Message:
    return Message(
        RecordDict({**message.content, messages.RECORD: order.record()}),
        dst_node_id=node,
        message_type=message.metadata.message_type,
        group_id=str(server_round),
    )


def _first_line(reason: str) -> str:
    lines = [line for line in reason.splitlines() if line.strip()]
    return lines[0][:300] if lines else "an error"


def _reasons(failures: Mapping[int, str]) -> str:
    shown = [f"Client {client}: {why.rstrip('.')}" for client, why in sorted(failures.items())[:3]]
    more = f", and {len(failures) - 3} more" if len(failures) > 3 else ""
    return f"{'. '.join(shown)}{more}."

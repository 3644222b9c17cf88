"""Any of Flower's strategies, made repeatable: which clients it samples, and what it draws, are
functions of the seed and the round.

Nothing of Flower is replaced for it. Each hook of a strategy is called with the absolute round,
under generators that are seeded for it, and with a grid whose nodes are the clients by number. So
it holds for the classes of Flower, for those that wrap another (differential privacy) and for a
user's own.
"""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import importlib
import inspect
import logging
import random
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import flwr.serverapp.strategy as flowers
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.app.exception import AppExitException
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from flwr.supercore.run import Run

from savepoint.errors import ConfigError, FederatedError
from savepoint.federated import messages
from savepoint.federated.federation import Component, Federation, component, refuse_texts
from savepoint.federated.training import seeded
from savepoint.loaders.randomness import derive
from savepoint.words import nearest

T = TypeVar("T")
Sent = tuple[int, Message]
"""A client's number, and what it is sent or has replied."""

OF_TREES = ("FedXgbBagging", "FedXgbCyclic")
_KEY = "federated.strategy"
_SHARED = (
    "fraction_train",
    "fraction_evaluate",
    "min_train_nodes",
    "min_evaluate_nodes",
    "min_available_nodes",
)
logging.getLogger("flwr").setLevel(logging.ERROR)  # it prints twenty lines a round


class Repeatable:
    """A strategy whose hooks repeat themselves."""

    def __init__(self, strategy: Strategy, federation: Federation, seed: int) -> None:
        self.strategy = strategy
        self.federation = federation
        self.seed = seed
        self._grid = _Numbers(federation.num_clients)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Sent]:
        configure = self.strategy.configure_train
        return self._sampled("train", server_round, arrays, config, configure)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Sent]:
        configure = self.strategy.configure_evaluate
        return self._sampled("evaluate", server_round, arrays, config, configure)

    def _sampled(
        self,
        kind: str,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        configure: Callable[..., Iterable[Message]],
    ) -> list[Sent]:
        made = self._seeded(
            kind, server_round, lambda: list(configure(server_round, arrays, config, self._grid))
        )
        return sorted(
            ((one.metadata.dst_node_id - 1, one) for one in made), key=lambda pair: pair[0]
        )

    def aggregate_train(
        self, server_round: int, replies: list[Sent]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The new arrays, of replies in the order of the clients: a sum of floats goes by it."""
        return self._aggregated("train", server_round, replies, self.strategy.aggregate_train)

    def aggregate_evaluate(self, server_round: int, replies: list[Sent]) -> MetricRecord | None:
        aggregate = self.strategy.aggregate_evaluate
        return self._aggregated("evaluate", server_round, replies, aggregate)

    def _aggregated(
        self, kind: str, server_round: int, replies: list[Sent], aggregate: Callable[..., T]
    ) -> T:
        given = [_plain(client, message) for client, message in replies]
        sent = [record for one in given for record in one.content.metric_records.values()]
        try:
            return self._seeded(
                f"aggregate {kind}", server_round, lambda: aggregate(server_round, given)
            )
        except AppExitException as error:  # what Flower's own strategies end a run with
            name = type(self.strategy).__name__
            metrics = ", ".join(sorted(set().union(*sent)))
            raise FederatedError(
                f"{name} has ended the run in round {server_round}: {error} The clients have sent "
                f"{metrics}. See {_KEY} in the config."
            ) from error

    def _seeded(self, kind: str, server_round: int, call: Callable[[], T]) -> T:
        stream = random.Random(f"{self.seed}:{kind}:{server_round}").getrandbits(63)
        with seeded(derive(stream)):
            return call()


def _plain(client: int, message: Message) -> Message:
    """As a strategy's own: without our record, and from the client by number. Flower draws the ids
    of nodes anew in each run, and a strategy may keep something of each.
    """
    message.content = messages.without_ours(message.content)
    metadata: Any = message.metadata
    metadata.__dict__["_src_node_id"] = client + 1
    return message


class _Numbers(Grid):
    """The clients by number, as nodes from 1 on: what a strategy samples from, whoever is
    connected.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def set_run(self, run: Run) -> None: ...

    @property
    def run(self) -> Run:
        return Run.create_empty(run_id=1)

    def get_node_ids(self) -> Iterable[int]:
        return list(range(1, self.number + 1))

    def create_message(self, *args: Any, **named: Any) -> Message:
        return Message(*args, **named)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError("A strategy's hooks make messages; the server sends them.")

    pull_messages = push_messages  # type: ignore[assignment]
    send_and_receive = push_messages  # type: ignore[assignment]


# -- from the config -----------------------------------------------------------------------------


def build(federation: Federation, seed: int = 0) -> Strategy:
    """The strategy of a config. What it draws when it is made goes by the seed.

    Raises:
        ConfigError: It is not known, or refuses its arguments.
    """
    with seeded(derive(seed)):
        return _made(federation.strategy, _KEY, federation)


def _made(given: Component, key: str, federation: Federation) -> Strategy:
    name, arguments = component(given, key)
    kind = _class(name, key)
    known = inspect.signature(kind).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in known.values())
    for argument, value in arguments.items():
        if argument not in known and not takes_any:
            near = nearest(argument, known) or f" {kind.__name__} takes {', '.join(known)}."
            raise ConfigError(f"Unknown key: {key}.{argument}.{near}")
        if isinstance(value, dict) and "class_path" in value:
            arguments[argument] = _made(value, f"{key}.{argument}", federation)
    refuse_texts(kind, arguments, key)
    shared = {one: getattr(federation, one) for one in _SHARED if one in known or takes_any}
    try:
        made: Strategy = kind(**{**shared, **arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{kind.__name__} refuses its arguments: {error}. See {key} in the config."
        ) from error
    return made


def _class(name: str, key: str) -> type[Strategy]:
    module, _, short = name.rpartition(".")
    if module:
        try:
            found = getattr(importlib.import_module(module), short, None)
        except ImportError as error:
            raise ConfigError(f"No such class for {key}: {name} ({error}).") from error
    else:
        found = getattr(flowers, name, None) or next(
            (one for one in _below(Strategy) if one.__name__ == name), None
        )
    if not isinstance(found, type) or not issubclass(found, Strategy):
        near = nearest(short, [one for one in flowers.__all__ if one not in ("Result", "Strategy")])
        raise ConfigError(
            f"No such class for {key}: {name}.{near} Expected a strategy of Flower by its name, "
            "or one of your own with its module."
        )
    if found.__name__ in OF_TREES:
        raise ConfigError(
            f"A strategy of trees: {name}. It joins models of XGBoost; a LightningModule has "
            f"weights. Give another one: --{key} FedAvg"
        )
    return found


def _below(base: type) -> set[type]:
    direct: list[type] = base.__subclasses__()
    return set(direct).union(*map(_below, direct))


def has_own_rounds(strategy: Strategy) -> bool:
    """Whether its class has a `start` of its own, which is not called: the rounds are ours."""
    return type(strategy).start is not Strategy.start

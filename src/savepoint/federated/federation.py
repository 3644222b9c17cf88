"""The config group `federated`, and whether Flower is there. Standard library only."""

import importlib.util
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from savepoint.errors import ConfigError

Component = str | dict[str, Any]
COMPONENTS = {"strategy": "FedAvg", "partitioner": "Dirichlet"}
"""The keys that name a class, with their defaults."""
RUNTIMES = ("local", "ray")
FLOWER = "flwr"
RAY = "ray"


class Federation:
    """How a model is trained by many clients, each on a part of the training set.

    Args:
        num_server_rounds: Rounds in all.
        num_clients: Parts of the training set, one a client.
        fraction_train: Share of the clients that train in a round.
        fraction_evaluate: Share of the clients that evaluate the new global model in a round.
        min_train_nodes: The least number of clients that train, whatever the share.
        min_evaluate_nodes: The least number of clients that evaluate, whatever the share; none do
            where `fraction_evaluate` is 0.
        min_available_nodes: Clients that must be connected before a round begins.
        local_epochs: Passes of a client through its part in a round.
        test_fraction: Share of each part that its client evaluates on and never trains on.
        strategy: A class of `flwr.serverapp.strategy`, or one of your own with its module; with
            arguments as `class_path` and `init_args`.
        lr_decay: In round r the learning rate of the model is multiplied by this to the power of
            r - 1.
        partitioner: How the training set is divided: Dirichlet, Iid or ByLabel.
        buffers: Of the model, such as the statistics of batch norm: the mean of the clients'
            whatever the strategy does with the weights, or what the strategy makes of them.
        personal: Names in the model's state_dict, each with all below it, that every client keeps
            for itself, as in [net.classify]. [""] is the whole model.
        share_personal: Whether they are sent and averaged too. False: they never leave the client.
        keep_optimizer: Whether a client goes on with the optimizer's state of its round before.
        save_client_models: Keep the whole model of a client after every n-th round; null for none.
        timeout: Seconds to wait for replies, and for clients to connect.
        min_replies: Replies that a round needs. Null: half of those asked.
        retries: How often those that did not reply are asked again.
        runtime: `local` in this process, `ray` in Flower's simulation.
        client_state_dir: Where a client keeps its state that does not see the run directory, as in
            a deployment; its SuperNode's node-config `client-state-dir` goes before.
        mods: Flower's client mods around each training, with their modules, as
            [flwr.clientapp.mod.fixedclipping_mod]; the first is the outermost.
    """

    def __init__(
        self,
        num_server_rounds: int = 10,
        num_clients: int = 50,
        fraction_train: float = 0.25,
        fraction_evaluate: float = 0.5,
        min_train_nodes: int = 2,
        min_evaluate_nodes: int = 2,
        min_available_nodes: int = 2,
        local_epochs: int = 1,
        test_fraction: float = 0.2,
        strategy: Component = "FedAvg",
        lr_decay: float = 1.0,
        partitioner: Component = "Dirichlet",
        buffers: Literal["average", "strategy"] = "average",
        personal: list[str] | None = None,
        share_personal: bool = False,
        keep_optimizer: bool = False,
        save_client_models: int | None = None,
        timeout: float = 600.0,
        min_replies: int | None = None,
        retries: int = 1,
        runtime: Literal["local", "ray"] = "local",
        client_state_dir: str = "client-states",
        mods: list[str] | None = None,
    ) -> None:
        self.num_server_rounds = num_server_rounds
        self.num_clients = num_clients
        self.fraction_train = fraction_train
        self.fraction_evaluate = fraction_evaluate
        self.min_train_nodes = min_train_nodes
        self.min_evaluate_nodes = min_evaluate_nodes
        self.min_available_nodes = min_available_nodes
        self.local_epochs = local_epochs
        self.test_fraction = test_fraction
        self.strategy = strategy
        self.lr_decay = lr_decay
        self.partitioner = partitioner
        self.buffers = buffers
        self.personal = personal or []
        self.share_personal = share_personal
        self.keep_optimizer = keep_optimizer
        self.save_client_models = save_client_models
        self.timeout = timeout
        self.min_replies = min_replies
        self.retries = retries
        self.runtime = runtime
        self.client_state_dir = client_state_dir
        self.mods = mods or []
        self._check()

    def _check(self) -> None:
        """Raises ConfigError for a value out of its range."""
        least: dict[str, tuple[float, float]] = {
            **dict.fromkeys(("num_server_rounds", "num_clients", "local_epochs"), (1, 1e9)),
            **dict.fromkeys(("min_train_nodes", "min_available_nodes"), (1, self.num_clients)),
            "min_evaluate_nodes": (0, self.num_clients),
            "fraction_train": (1e-9, 1),
            **dict.fromkeys(("fraction_evaluate", "test_fraction"), (0, 1)),
            "lr_decay": (1e-9, 1e9),
            "timeout": (1e-9, 1e9),
            "retries": (0, 1000),
            **dict.fromkeys(("min_replies", "save_client_models"), (1, 1e9)),
        }
        for name, (low, high) in least.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(
                    f"Out of range: federated.{name} is {value}. Expected {low:.9g} to "
                    f"{high:.9g}. Give another one: --federated.{name} VALUE"
                )
        if self.test_fraction == 1 or (self.test_fraction == 0 and self.fraction_evaluate > 0):
            raise ConfigError(
                f"Nothing to train or to evaluate on: federated.test_fraction is "
                f"{self.test_fraction}. A client trains on the rest of its part and evaluates on "
                "this share. Give one between, or 0 with --federated.fraction_evaluate 0."
            )

    def keeps(self, name: str) -> bool:
        """Whether a name of the state_dict is personal."""
        return any(is_below(name, one) for one in self.personal)

    def sends(self, name: str) -> bool:
        """Whether a name of the state_dict is exchanged with the server."""
        return self.share_personal or not self.keeps(name)

    def replies_needed(self, asked: int) -> int:
        """Of so many clients that were asked."""
        if not asked:
            return 0
        return (asked + 1) // 2 if self.min_replies is None else min(self.min_replies, asked)


def is_below(name: str, part: str) -> bool:
    """Whether a name of the state_dict is a part of the model, or of it; "" is the whole model."""
    return part in ("", name) or name.startswith(f"{part.rstrip('.')}.")


def component(given: Component, key: str) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a class in a config.

    Raises:
        ConfigError: No class is named.
    """
    if isinstance(given, str):
        return given, {}
    name = given.get("class_path")
    unknown = sorted(given.keys() - {"class_path", "init_args"})
    if not isinstance(name, str) or unknown:
        raise ConfigError(
            f"Not a class: {key} is {given}. Expected a name, or `class_path` and `init_args`. On "
            f"the command line: --{key} NAME --{key}.KEY VALUE"
        )
    return name, dict(given.get("init_args") or {})


def refuse_texts(kind: type, arguments: Mapping[str, Any], key: str) -> None:
    """Raises ConfigError where a text stands for a number, or the other way round: the class would
    say so in a traceback, and not before the first round.
    """
    for name, one in inspect.signature(kind).parameters.items():
        kinds: Any = {float: (int, float), int: int, str: str}.get(one.annotation)
        value = arguments.get(name)
        if kinds and value is not None and not isinstance(value, kinds):
            expected = one.annotation.__name__
            raise ConfigError(f"Wrong value of --{key}.{name}: {value}. Expected {expected}.")


def is_wanted(config: Mapping[str, Any], flags: Sequence[tuple[str, str]]) -> bool:
    """Whether a run of this config and these flags is federated."""
    return "federated" in config or any(key.split(".")[0] == "federated" for key, _ in flags)


def require_flower(runtime: str = "local") -> None:
    """Raises ConfigError where Flower, or Ray for the runtime that needs it, is not installed."""
    names = (FLOWER, RAY) if runtime == "ray" else (FLOWER,)
    lacking = [name for name in names if importlib.util.find_spec(name) is None]
    if lacking:
        extra = "federated-ray" if runtime == "ray" else "federated"
        raise ConfigError(
            f"Not installed: {', '.join(lacking)}. A config with `federated` trains with Flower. "
            f"Install it: make extras-federated, or pip install 'savepoint-lightning[{extra}]'"
        )

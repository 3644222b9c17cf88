"""What one client does: trains the project's LightningModule on its part, and evaluates it. A
Lightning Trainer does both. No Flower.
"""

import copy
import signal
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.optim import Optimizer

from savepoint import preemption, weights
from savepoint.checkpoint.canary import canary
from savepoint.config import typed
from savepoint.errors import ConfigError
from savepoint.federated.federation import Federation, is_below
from savepoint.federated.partition import Indices, Partition
from savepoint.loaders.randomness import Randomness, derive, generators_of
from savepoint.look.baseline import Baseline
from savepoint.look.kinds import Unpackable
from savepoint.look.pack import pack
from savepoint.look.places import in_words, path_of
from savepoint.look.unpack import unpack
from savepoint.look.walk import Look
from savepoint.training import build

Weights = Mapping[str, Tensor]
# Of each local Trainer. The rest is the config's group `trainer`.
LOCAL = {
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
    "max_steps": -1,
    "devices": 1,
    "num_nodes": 1,
    "profiler": None,
}


class Divisible(Protocol):
    """What a data module needs to be federated.

    Attributes:
        labels: Of the training set, in its order.
    """

    labels: Any

    def part(self, indices: Indices, seed: int | None) -> Any:
        """A loader of the training samples at `indices`: with a seed in an order of its own, and
        augmented; without one in order, as they are.
        """


@dataclass
class Trained:
    """What a client has made in a round.

    Attributes:
        weights: Its whole model.
        keeps: The state that it goes on with; empty where it keeps nothing.
        samples: It has trained on.
    """

    weights: Weights
    metrics: dict[str, float]
    samples: int
    keeps: dict[str, Any] = field(default_factory=dict)


class LocalTraining:
    """Model, data and their division, built once a process, and used by all clients in it.

    Args:
        built: Model and data that are there already, with the random states of their `setup`.

    Attributes:
        shared: Words for what clients have changed that others see.
    """

    def __init__(
        self, config: Any, built: tuple[LightningModule, LightningDataModule] | None = None
    ) -> None:
        build.quieten()
        # Of each training of a client: it is evaluated when the server asks.
        warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
        self.config = config
        self.federation = federation_of(config)
        self.shared: dict[str, None] = {}
        self.model, data = built or _built(config)
        if weights.makes_layers_late(self.model):
            raise ConfigError(
                f"Layers that are made late: {type(self.model).__name__} has a `setup` or a "
                "`configure_model`. A federated run sends the weights before a Trainer calls "
                "these. Make the layers in `__init__`."
            )
        _check_takes_state(self.model)
        _check_personal(self.federation, self.model)
        _check_divisible(data)
        self.data = data
        data.prepare_data()
        data.setup("fit")
        self._unused = self._new_trainer()
        self._unused.precision_plugin.convert_module(self.model)
        self._shown = copy.deepcopy(self.model).eval()
        given = self.federation
        self.partition = Partition(
            cast(Divisible, data).labels,
            given.partitioner,
            given.num_clients,
            given.test_fraction,
            config.seed_everything,
        )

    def _look(self) -> Look:
        roots = {"model": self.model, "data": self.data}
        return Look(roots, {}, self.model.state_dict().keys())

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Notes in `shared` what clients change in this process beyond themselves: data, classes,
        globals of modules. The next client finds it, and in another process would not.
        """
        start = Baseline(self._look())
        yield
        changed, named = start.changes(self._look())
        places = [f"{in_words(path_of(place))} (changed by a client)" for place, _ in changed]
        self.shared |= dict.fromkeys([*places, *named])

    def _new_trainer(self) -> Trainer:
        configured = self.config.trainer
        if configured.devices not in ("auto", 1, "1") or configured.num_nodes != 1:
            raise ConfigError(
                f"One device a client: trainer.devices is {configured.devices}, trainer.num_nodes "
                f"{configured.num_nodes}. Expected 1 of each. Leave them out."
            )
        epochs = self.federation.local_epochs
        return typed.local_trainer(self.config, **LOCAL, max_epochs=epochs)

    def _trainer(self, *callbacks: Callback) -> Trainer:
        """For one client: a copy of one that was never used, as Lightning takes longer to make it
        than to train on a small part. With callbacks of the config it is made, as they are.
        """
        made = self._new_trainer() if self.config.trainer.callbacks else copy.deepcopy(self._unused)
        own: list[Callback] = made.callbacks  # type: ignore[attr-defined]
        own += callbacks
        return made

    # -- a client ---------------------------------------------------------------------------------

    def train(
        self,
        client: int,
        server_round: int,
        received: Weights,
        state: Mapping[str, Any],
        *,
        lr_factor: float = 1.0,
        proximal_mu: float = 0.0,
    ) -> Trained:
        """One client's round.

        Args:
            received: The global weights, without what is personal.
            state: What the client has kept; empty for none.
            lr_factor: Of every learning rate.
            proximal_mu: Of FedProx: how strongly the weights are held near the received ones.
        """
        seed = derive(self.config.seed_everything, server_round, client)
        indices = self.partition.train(client)
        model = copy.deepcopy(self.model)
        own = copy.deepcopy(dict(state))  # an optimizer goes on in the tensors that it is given
        with self._seeded(seed, model):
            _load(model, received, own)
            local = _Local(own.get("optimizer_states", []), lr_factor, proximal_mu)
            trainer = self._trainer(local)
            trainer.limit_val_batches = 0
            try:
                trainer.fit(model, cast(Divisible, self.data).part(indices, seed))
            except SIGTERMException:
                if not preemption.requests.armed:
                    raise
                # It came before our handler was back: the client trains again, and the server
                # stops after the round.
                preemption.requests.stop = signal.SIGTERM
                again = {"lr_factor": lr_factor, "proximal_mu": proximal_mu}
                return self.train(client, server_round, received, state, **again)
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        made = _on_cpu(model.state_dict())
        return Trained(made, metrics, len(indices), self._kept(model, trainer, made))

    def evaluate(
        self, client: int, server_round: int, received: Weights, state: Mapping[str, Any]
    ) -> tuple[dict[str, float], int]:
        """Metrics of the received model, with what is personal, on the client's own samples; and
        how many these are.
        """
        indices = self.partition.test(client)
        model = copy.deepcopy(self.model)
        with self._seeded(derive(self.config.seed_everything, server_round, client, 1), model):
            _load(model, received, state)
            loader = cast(Divisible, self.data).part(indices, None)
            trainer = self._trainer()
            [measured] = trainer.validate(model, loader, verbose=False)
        _pass_on(trainer)
        return {name: float(value) for name, value in measured.items()}, len(indices)

    def _seeded(self, seed: int, model: LightningModule) -> AbstractContextManager[None]:
        """Also what the model and the data draw from themselves: it depends on nobody else then."""
        own = [one for part in model.modules() for one in generators_of(vars(part))]
        return seeded(seed, [*own, *generators_of(self.data)])

    def _kept(self, model: LightningModule, trainer: Trainer, made: Weights) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        if self.federation.personal:
            keeps = self.federation.keeps
            kept["state_dict"] = {name: value for name, value in made.items() if keeps(name)}
        if self.federation.keep_optimizer:
            states = [optimizer.state_dict()["state"] for optimizer in trainer.optimizers]
            kept["optimizer_states"] = [_on_cpu(state) for state in states]
        if hasattr(model, "client_state"):
            kept["user"] = _packed(model)
        return kept

    def canary(self, state_dict: Weights) -> dict[str, Any] | None:
        """A sample of what these weights compute, in the model that a checkpoint is loaded into."""
        self._shown.load_state_dict(dict(state_dict))
        return canary(self._shown, self._shown.state_dict())

    # -- the server -------------------------------------------------------------------------------

    def validate(self, server_round: int, state_dict: Weights) -> dict[str, float]:
        """The global model on the validation data; empty where there is none."""
        has_step = is_overridden("validation_step", self.model)
        if not has_step or not is_overridden("val_dataloader", self.data):
            return {}
        model = copy.deepcopy(self.model)
        with self._seeded(derive(self.config.seed_everything, server_round), model):
            model.load_state_dict(dict(state_dict))
            trainer = self._trainer()
            [measured, *others] = trainer.validate(model, datamodule=self.data, verbose=False)
            self.data.trainer = None
        _pass_on(trainer)
        for more in others:
            measured = {**measured, **more}
        return {name: float(value) for name, value in measured.items()}


class _Local(Callback):
    """Puts a kept optimizer's state back, scales the learning rates, pulls towards the received
    weights.
    """

    def __init__(
        self, optimizer_states: list[dict[Any, Any]], lr_factor: float, proximal_mu: float
    ) -> None:
        self.optimizer_states = optimizer_states
        self.lr_factor = lr_factor
        self.proximal_mu = proximal_mu
        self._received: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if preemption.requests.armed:  # the server is in this process: it stops after the round
            preemption.install()  # Lightning has just put its own handler in the place of ours
        for optimizer, state in zip(trainer.optimizers, self.optimizer_states, strict=False):
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": state, "param_groups": groups})
        for optimizer in trainer.optimizers:
            self._scale(optimizer)
        if self.proximal_mu:
            self._received = [one.detach().clone() for one in pl_module.parameters()]

    def _scale(self, optimizer: Optimizer) -> None:
        """Around each step: a schedule sets the rates as if there was no factor."""
        rates: list[Any] = []

        def before(*_: Any) -> None:
            rates[:] = [group["lr"] for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.lr_factor

        def after(*_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        if not self.proximal_mu:
            return
        for now, received in zip(pl_module.parameters(), self._received, strict=True):
            if now.grad is not None:
                now.grad.add_(now.detach() - received, alpha=self.proximal_mu)


def _pass_on(trainer: Trainer) -> None:
    """A SIGTERM that Lightning's own handler has taken, which an evaluation does not act on."""
    if preemption.requests.armed and trainer.received_sigterm:
        preemption.requests.stop = signal.SIGTERM


def federation_of(config: Any) -> Federation:
    found = typed.federation_of(config)
    assert found is not None  # only such configs come here
    return found


def _built(config: Any) -> tuple[LightningModule, LightningDataModule]:
    model, data, _ = typed.instantiate(config, logger=False)
    data.setup = build.RepeatedSetup(data)  # type: ignore[method-assign]
    return model, data


def _check_takes_state(model: LightningModule) -> None:
    if hasattr(model, "client_state") and not hasattr(model, "load_client_state"):
        raise ConfigError(
            f"A state that nobody takes back: {type(model).__name__} has client_state and no "
            "load_client_state. A client goes on with what it kept. Add the second one."
        )


def _check_personal(federation: Federation, model: LightningModule) -> None:
    names = list(model.state_dict())
    for one in federation.personal:
        if not any(is_below(name, one) for name in names):
            raise ConfigError(
                f"No such part of the model: federated.personal names {one}. Expected the start of "
                f"a name in its state_dict, such as {names[-1].rpartition('.')[0] or names[-1]}. "
                "Change --federated.personal '[NAME]'"
            )


def _check_divisible(data: LightningDataModule) -> None:
    lacking = [name for name in ("labels", "part") if not hasattr(type(data), name)]
    if lacking:
        raise ConfigError(
            f"Not divisible among clients: {type(data).__name__} has no {' and no '.join(lacking)}."
            " A federated run asks its data module for `labels`, of the training set, and "
            "`part(indices, seed)`, a loader of some of it. CONTRIBUTING.md shows both."
        )


def _load(model: LightningModule, received: Weights, state: Mapping[str, Any]) -> None:
    own = model.state_dict()
    model.load_state_dict({**own, **received, **state.get("state_dict", {})})
    if "user" in state:
        cast(Any, model).load_client_state(unpack(state["user"]))


def _packed(model: LightningModule) -> Any:
    try:
        return _on_cpu(pack(cast(Any, model).client_state()))
    except Unpackable as error:
        what = error.args[0]
        held = what if isinstance(what, str) else f"a {type(what).__name__}"
        raise ConfigError(
            f"A client's state that cannot be saved: what {type(model).__name__}.client_state "
            f"returns holds {held}. Expected numbers, texts, tensors, arrays and containers of "
            "these. Leave it out, or return what it can be made of again."
        ) from error


@contextmanager
def seeded(seed: int, own: Sequence[Any] = ()) -> Iterator[None]:
    """Python's, NumPy's and torch's generators and `own`, and put back as they were."""
    with Randomness(own).seeded(seed):
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        yield


def _on_cpu(value: Any) -> Any:
    """A copy, with memory of its own for each tensor, of plain containers."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone(memory_format=torch.contiguous_format)
    if isinstance(value, Mapping):
        return {name: _on_cpu(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item) for item in value)
    return value

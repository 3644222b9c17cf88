"""Flower's ClientApp: carries out the server's orders, in whatever process it runs."""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from savepoint.config import typed
from savepoint.errors import (
    CheckpointSaveError,
    ClientStateError,
    ConfigError,
    SavepointError,
)
from savepoint.federated import clients, messages
from savepoint.federated.clients import ClientStates, Version
from savepoint.federated.messages import Answer, Order, arrays_of, tensors_of, without_ours
from savepoint.federated.training import LocalTraining, Trained, seeded
from savepoint.loaders.randomness import derive
from savepoint.training import threads

Handler = Callable[[Order, Message, Context], Message]

app = ClientApp()
_trainings: dict[str, LocalTraining] = {}


def use(config: str, training: LocalTraining | None) -> None:
    """Lets the clients of this process share what the server has built; None forgets it."""
    _trainings.clear()
    if training is not None:
        _trainings[config] = training


@app.query("partition")
def partition(message: Message, context: Context) -> Message:
    """Node ids are drawn anew in each run of Flower: the part of the data names a client."""
    number = int(context.node_config["partition-id"])
    content = RecordDict({messages.RECORD: ConfigRecord({"partition": number})})
    return Message(content, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    return _carried_out(message, context, _train)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    return _carried_out(message, context, _evaluate)


def _carried_out(message: Message, context: Context, handler: Handler) -> Message:
    """The reply; an error of ours in words: not every runtime of Flower tells what was raised."""
    try:
        order = Order.of(message.content)
        training = _training(order)
        called: Any = partial(handler, order)
        # Flower's mods expect the records of a strategy alone.
        message.content = without_ours(message.content)
        is_training = message.metadata.message_type.startswith(MessageType.TRAIN)
        for name in reversed(training.federation.mods if is_training else []):
            called = partial(mod_named(name), call_next=called)
        # For what a mod draws; a training has a seed of its own.
        with seeded(derive(training.config.seed_everything, order.server_round, order.client, 2)):
            return cast(Message, called(message, context))
    except CheckpointSaveError as error:
        answer = Answer("failed", str(error))
    except SavepointError as error:
        answer = Answer("refused", str(error))
    return Message(RecordDict({messages.RECORD: answer.record()}), reply_to=message)


def mod_named(name: str) -> Any:
    module, _, short = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), short)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"No such client mod: {name} ({error}). Expected one of Flower's or your own, with "
            "its module. Change federated.mods."
        ) from error


def _train(order: Order, message: Message, context: Context) -> Message:
    training = _training(order)
    state, anew = _state(order, context, training)
    extra = cast(ConfigRecord, message.content.get(messages.CONFIG, ConfigRecord()))
    made = training.train(
        order.client,
        order.server_round,
        _received(message, training),
        state,
        lr_factor=order.lr_factor * _asked_factor(extra, training.config),
        proximal_mu=float(cast(float, extra.get("proximal-mu", 0.0))),
    )
    saved = _save(order, context, training, made)
    answer = Answer(state_round=saved.round, state_digest=saved.digest, anew=anew)
    sent = {name: one for name, one in made.weights.items() if training.federation.sends(name)}
    metrics = MetricRecord({**made.metrics, messages.SAMPLES: made.samples})
    content: Any = {messages.ARRAYS: arrays_of(sent), messages.METRICS: metrics}
    return Message(RecordDict({**content, messages.RECORD: answer.record()}), reply_to=message)


def _evaluate(order: Order, message: Message, context: Context) -> Message:
    training = _training(order)
    state, anew = _state(order, context, training)
    received = _received(message, training)
    measured, samples = training.evaluate(order.client, order.server_round, received, state)
    metrics = MetricRecord({**measured, messages.SAMPLES: samples})
    answer = Answer(state_round=order.state_round, state_digest=order.state_digest, anew=anew)
    content: Any = {messages.METRICS: metrics, messages.RECORD: answer.record()}
    return Message(RecordDict(content), reply_to=message)


def _training(order: Order) -> LocalTraining:
    """Built once a process: reading the config and the data takes longer than a client's round."""
    if order.config not in _trainings:
        config = typed.parse([], base=order.config)
        training = LocalTraining(config)
        threads.use(threads.chosen(config.threads))
        use(order.config, training)
    return _trainings[order.config]


def _received(message: Message, training: LocalTraining) -> dict[str, Any]:
    arrays = next(iter(message.content.array_records.values()), ArrayRecord())
    return tensors_of(arrays, training.model.state_dict())


def learning_rate(config: Any) -> float:
    """The model's, where its config has one: what a strategy finds under `lr` in its own config."""
    rate = config.model.init_args.get("lr") if "init_args" in config.model else None
    return float(rate) if isinstance(rate, int | float) and rate else 1.0


def _asked_factor(extra: ConfigRecord, config: Any) -> float:
    """What a strategy has made of the learning rate, as Flower's own example halves it."""
    usual = learning_rate(config)
    return float(cast(float, extra.get("lr", usual))) / usual


# -- what a client keeps -------------------------------------------------------------------------


def _states(order: Order, context: Context, training: LocalTraining) -> ClientStates:
    given = context.node_config.get("client-state-dir")
    if given is None and Path(order.directory).is_dir():
        return ClientStates([Path(order.directory) / clients.FOLDER], order.client)
    root = Path(str(given or training.federation.client_state_dir)).expanduser()
    return ClientStates([root / name for name in order.run_ids], order.client)


def _state(order: Order, context: Context, training: LocalTraining) -> tuple[Any, bool]:
    """What the client goes on with, and whether it begins anew though it had a state."""
    if not order.state_round:
        return {}, False
    version = Version(order.state_round, order.state_digest)
    try:
        return _states(order, context, training).load(version), False
    except ClientStateError:
        if not order.allows_lost:
            raise
        return {}, True


def _save(order: Order, context: Context, training: LocalTraining, made: Trained) -> Version:
    """On disk before the reply is sent."""
    states = _states(order, context, training)
    if order.saves_model:
        states.save_model(_whole(order, training, made), order.server_round, order.run_ids[0])
    if not made.keeps:
        return Version(0, "")
    # Until the reply has come the server's next order names the state of before.
    keep = {*order.keep, order.state_round}
    return states.save(made.keeps, order.server_round, order.run_ids[0], keep)


def _whole(order: Order, training: LocalTraining, made: Trained) -> dict[str, Any]:
    """A checkpoint of a client's model, as `export` and `eval` read it."""
    return {
        "state_dict": dict(made.weights),
        "epoch": order.server_round,
        "global_step": order.server_round,
        "optimizer_states": [],
        "lr_schedulers": [],
        "config": order.config,
        "canary": training.canary(made.weights),
    }

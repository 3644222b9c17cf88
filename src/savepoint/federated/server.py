"""The rounds of a federated run, on any of Flower's grids: ask, aggregate, evaluate, log, save."""

# mypy: disable-error-code="import-not-found,misc,no-any-return,unused-ignore,untyped-decorator"
# Without Flower, which is optional, its types are Any.

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import lightning
import torch
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from savepoint import preemption
from savepoint.checkpoint import facts, format
from savepoint.errors import ClientStateError, ConfigError, FederatedError
from savepoint.federated import results, strategy
from savepoint.federated.asking import Clients, Replies
from savepoint.federated.client_app import learning_rate, mod_named
from savepoint.federated.clients import Version
from savepoint.federated.listing import versions_of
from savepoint.federated.messages import SAMPLES, Order, array_of, arrays_of, tensors_of
from savepoint.federated.saver import Made, RoundSaver
from savepoint.federated.state import StrategyState
from savepoint.federated.strategy import Repeatable, Sent
from savepoint.federated.training import LocalTraining
from savepoint.training.build import Training
from savepoint.training.logs import RunCSVLogger, RunTensorBoardLogger
from savepoint.words import duration, metric, plural

ENDED = "num_server_rounds"
_CPU = torch.device("cpu")


@dataclass
class Progress:
    """What changes from round to round, beside the strategy.

    Attributes:
        state_dict: The global model.
        history: A row a round, as in results.json.
        states: The newest state of each client that keeps one.
        measured: The newest metrics of each client that was asked to evaluate.
        samples: That clients have trained on, over all starts.
        secs: Of all starts.
    """

    round: int
    state_dict: dict[str, Tensor]
    history: list[dict[str, Any]] = field(default_factory=list)
    states: dict[int, Version] = field(default_factory=dict)
    measured: dict[int, dict[str, Any]] = field(default_factory=dict)
    samples: int = 0
    secs: float = 0.0


class Server:
    """One start of a federated run.

    Args:
        run_ids: Of the run, and of those that it was forked from.
        allow: What `--allow` names.
    """

    def __init__(
        self, training: Training, config: Any, run_ids: list[str], allow: list[str] | None = None
    ) -> None:
        if config.checkpoint.mirror:
            raise ConfigError(
                f"A mirror of a federated run: checkpoint.mirror is {config.checkpoint.mirror}. "
                "The states of its clients would not be in it, and without them it cannot go on. "
                "Leave it away: --checkpoint.mirror null"
            )
        self.training = training
        self.config = config
        self.run_ids = run_ids
        self.allows_lost = "clients" in (allow or [])
        self.local = LocalTraining(config, (training.model, training.data))
        self.federation = self.local.federation
        for name in self.federation.mods:
            mod_named(name)  # or the first client would refuse it
        made = strategy.build(self.federation, config.seed_everything)
        if strategy.has_own_rounds(made):
            name = type(made).__name__
            print(f"{name}.start is not called: its rounds are Savepoint's own.", flush=True)
        self.strategy = Repeatable(made, self.federation, config.seed_everything)
        self.strategy_state = StrategyState(made)
        lr = learning_rate(config)
        self.train_config = ConfigRecord({"lr": lr})
        self.evaluate_config = ConfigRecord({"lr": lr})
        self.progress = Progress(0, self._initial())
        self._counts = self.local.partition.counts()
        self._tables: dict[int, dict[int, int]] = {}  # of each kept checkpoint: client -> round
        self.saver = self._saver()

    @property
    def text(self) -> str:
        """The config as checkpoints and clients get it."""
        return self.training.checkpointing.saver.provenance.config

    def _initial(self) -> dict[str, Tensor]:
        model = self.training.model.state_dict()
        return {name: one.detach().cpu().clone() for name, one in model.items()}

    def _saver(self) -> RoundSaver:
        checkpointing = self.training.checkpointing
        given = self.config.checkpoint
        return RoundSaver(
            checkpointing.store,
            checkpointing.scores,
            self.training.run,
            self._csv(),
            self.derive,
            [name for name, _ in self.training.model.named_parameters()],
            save_every_epochs=given.save_every_epochs,
            save_every_steps=given.save_every_steps,
            save_every_secs=given.save_every_secs,
            on_nan=given.on_nan,
        )

    def _csv(self) -> RunCSVLogger:
        return next(one for one in self.training.trainer.loggers if isinstance(one, RunCSVLogger))

    # -- going on ---------------------------------------------------------------------------------

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a checkpoint."""
        saved = state["federated"]
        self.strategy_state.restore(saved["strategy"])
        self.train_config = ConfigRecord(dict(saved["train_config"]))
        self.evaluate_config = ConfigRecord(dict(saved["evaluate_config"]))
        self.progress = Progress(
            saved["round"],
            dict(state["state_dict"]),
            list(saved["history"]),
            versions_of(state),
            dict(saved["measured"]),
            state["callbacks"]["Meter"]["samples"],
            state["callbacks"]["Meter"]["secs"],
        )
        self.training.checkpointing.scores.load_state_dict(saved["scores"])
        self.saver.saved_step = saved["round"]

    def read_tables(self) -> None:
        """Which states of clients the kept checkpoints name."""
        for one in self.saver.store.checkpoints():
            with suppress(OSError, ValueError):  # a damaged one names nothing
                named = versions_of(format.decode(one.path))
                self._tables[one.step] = {who: version.round for who, version in named.items()}

    # -- the rounds -------------------------------------------------------------------------------

    def run(self, grid: Grid) -> None:
        """All rounds that are left.

        Raises:
            FederatedError, ClientStateError: A round could not be played; the last good one is
                saved.
            Preempted: A signal has asked to stop; saved.
        """
        asking = Clients(grid, self.federation)
        preemption.arm()
        self.saver.begin()
        began = time.monotonic()
        before = self.progress.secs
        first = self.progress.round
        try:
            while self.progress.round < self.federation.num_server_rounds:
                self._play(asking)
                self.progress.secs = before + time.monotonic() - began
                done = self.progress.round
                self._say(done, (time.monotonic() - began) / (done - first))
                ended = ENDED if done == self.federation.num_server_rounds else ""
                self.saver.end_round(done, self._made, ended)
                self.training.checkpointing.scores.require_monitor()
        except (FederatedError, ClientStateError):
            if self.progress.round > max(first, self.saver.saved_step):
                self.saver.save(self.progress.round, self._made, "failure")
            raise
        finally:
            preemption.disarm()

    def _play(self, asking: Clients) -> None:
        """One round."""
        number = self.progress.round + 1
        clock = [time.monotonic()]
        arrays = arrays_of(self._sent(self.progress.state_dict))
        sent = self.strategy.configure_train(number, arrays, self.train_config)
        with self.local.watched():
            trained = asking.ask(number, sent, lambda client: self._order(client, number))
        clock.append(time.monotonic())
        state_dict, train_metrics = self._aggregated(number, trained)
        self._note_states(trained)
        arrays = arrays_of(self._sent(state_dict))
        clock.append(time.monotonic())
        sent = self.strategy.configure_evaluate(number, arrays, self.evaluate_config)
        with self.local.watched():
            evaluated = asking.ask(number, sent, lambda client: self._order(client, number))
        self._note_metrics(number, evaluated)
        local_metrics = self.strategy.aggregate_evaluate(number, evaluated.good)
        clock.append(time.monotonic())
        central_metrics = self.local.validate(number, state_dict)
        clock.append(time.monotonic())
        self.progress.round = number
        self.progress.state_dict = state_dict
        row = {
            "round": number,
            "train_metrics": _plain(train_metrics),
            "evaluate_metrics_clientapp": _plain(local_metrics),
            "evaluate_metrics_serverapp": central_metrics,
            "clients": [client for client, _ in trained.good],
            "failures": {
                str(client): why
                for client, why in sorted({**evaluated.failures, **trained.failures}.items())
            },
        }
        self.progress.history.append(row)
        self._log(row, clock)

    def _order(self, client: int, server_round: int) -> Order:
        version = self.progress.states.get(client, Version(0, ""))
        keep = {table[client] for table in self._tables.values() if client in table}
        every = self.federation.save_client_models
        directory = self.training.run.directory.absolute()
        return Order(
            config=self.text,
            client=client,
            server_round=server_round,
            lr_factor=self.federation.lr_decay ** (server_round - 1),
            run_ids=self.run_ids,
            directory=str(directory),
            state_round=version.round,
            state_digest=version.digest,
            keep=sorted(keep),
            saves_model=bool(every) and server_round % (every or 1) == 0,
            allows_lost=self.allows_lost,
        )

    def _sent(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: one for name, one in state_dict.items() if self.federation.sends(name)}

    def _aggregated(
        self, number: int, trained: Replies
    ) -> tuple[dict[str, Tensor], MetricRecord | None]:
        """The new global model. A strategy that gives none ends the run: the model before would
        count as a round.
        """
        mean = self._mean_of_buffers(trained.good)
        arrays, metrics = self.strategy.aggregate_train(number, trained.good)
        if arrays is None:
            name = type(self.strategy.strategy).__name__
            raise FederatedError(
                f"No model in round {number}: {name} has made none of {len(trained.good)} replies. "
                "Expected the arrays of a model. Look at what it asks for."
            )
        model = self.progress.state_dict
        return {**model, **tensors_of(arrays, model), **mean}, metrics

    def _mean_of_buffers(self, replies: list[Sent]) -> dict[str, Tensor]:
        """The mean of what the clients send, where that is no matter of the strategy."""
        buffers = self._sent(self.progress.state_dict).keys() - self.saver.parameters
        if self.federation.buffers == "strategy" or not buffers:
            return {}
        contents = [message.content for _, message in replies]
        samples = [_number(one, SAMPLES) for one in contents]
        total: dict[str, Any] = {}
        for content, number in zip(contents, samples, strict=True):
            [arrays] = content.array_records.values()
            for name in buffers:
                share = array_of(arrays[name]) * (number / sum(samples))
                total[name] = total[name] + share if name in total else share
        record = arrays_of({name: torch.as_tensor(one) for name, one in total.items()})
        return tensors_of(record, self.progress.state_dict)

    def _note_states(self, trained: Replies) -> None:
        for client, answer in trained.answers.items():
            if answer.state_round:
                version = Version(answer.state_round, answer.state_digest)
                self.progress.states[client] = version
            if answer.anew:
                print(f"Client {client} has begun anew: its state was lost.", flush=True)
        samples = [_number(message.content, SAMPLES) for _, message in trained.good]
        self.progress.samples += int(sum(samples)) * self.federation.local_epochs

    def _note_metrics(self, number: int, evaluated: Replies) -> None:
        for client, message in evaluated.good:
            [measured] = message.content.metric_records.values()
            metrics = {name: one for name, one in measured.items() if name != SAMPLES}
            self.progress.measured[client] = {"round": number, "metrics": metrics}

    # -- telling ----------------------------------------------------------------------------------

    def _log(self, row: Mapping[str, Any], clock: list[float]) -> None:
        number = row["round"]
        local = {f"clients/{key}": one for key, one in row["evaluate_metrics_clientapp"].items()}
        measured = {**row["train_metrics"], **local, **row["evaluate_metrics_serverapp"]}
        measured = {key: one for key, one in measured.items() if isinstance(one, int | float)}
        names = ("train", "aggregate", "clients", "server")
        spans = zip(names, clock, clock[1:], strict=False)
        times = {f"time/{name}_secs": round(end - start, 3) for name, start, end in spans}
        counts = {"clients/failures": float(len(row["failures"]))}
        scores = self.training.checkpointing.scores
        scores.measure_validation({key: torch.tensor(one) for key, one in measured.items()}, number)
        for logger in self.training.trainer.loggers:
            logger.log_metrics({**measured, **counts, **times}, step=number)
            logger.save()

    def _say(self, number: int, secs: float) -> None:
        row = self.progress.history[-1]
        left = secs * (self.federation.num_server_rounds - number)
        said = [plural(len(row["clients"]), "client")]
        if row["failures"]:
            said.append(plural(len(row["failures"]), "failure"))
        local = {f"clients/{key}": one for key, one in row["evaluate_metrics_clientapp"].items()}
        for name, one in {**row["evaluate_metrics_serverapp"], **local}.items():
            if name.endswith(("accuracy", "loss")):
                said.append(f"{name} {metric(name, one)}")
        total = self.federation.num_server_rounds
        rest = f" ({duration(left)} left)" if number < total else ""
        print(f"round {number}/{total}{rest}: {', '.join(said)}, {secs:.1f} s a round", flush=True)
        for client, why in list(row["failures"].items())[:3]:
            print(f"  client {client} failed: {why}", flush=True)

    # -- saving -----------------------------------------------------------------------------------

    def _made(self, reason: str, ended: str | None) -> Made:
        """The state of a checkpoint, and its facts. What depends on the number of starts stands in
        the facts and under `run` and `callbacks`: all else is equal in equal runs.
        """
        number = self.progress.round
        scores = self.training.checkpointing.scores
        provenance = self.training.checkpointing.saver.provenance
        strategy_state = self.strategy_state.capture()
        unsaved = [*strategy_state["unsaved"], *self.local.shared]
        self.saver.say_inexact(unsaved)
        known = facts.of_run(provenance, self.training.data, _CPU) | {
            "kind": "federated",
            "step": number,
            "logged_step": number,
            "epoch": number,
            "world_size": 1,
            "at": "round",
            "exact": not unsaved,
            "unsaved": unsaved[:20],
            "reason": reason,
            "ended": ended,
        }
        return self._state(number, strategy_state), known | scores.facts(number)

    def _state(self, number: int, strategy_state: Mapping[str, Any]) -> dict[str, Any]:
        checkpointing = self.training.checkpointing
        meter = {"samples": self.progress.samples, "secs": self.progress.secs}
        state_dict = self.progress.state_dict
        return {
            "epoch": number,
            "global_step": number,
            "pytorch-lightning_version": lightning.__version__,
            "state_dict": state_dict,
            "hyper_parameters": dict(self.training.model.hparams),
            "optimizer_states": [],
            "lr_schedulers": [],
            "callbacks": {"Meter": meter},
            "config": self.text,
            "run": dict(checkpointing.saver.provenance.run),
            "canary": self.local.canary(state_dict),
            checkpointing.scores.key: checkpointing.scores.best,
            "logged_rows": self._csv().rows,
            "events": self._events(),
            "federated": self._federated(number) | {"strategy": strategy_state},
        }

    def _federated(self, number: int) -> dict[str, Any]:
        progress = self.progress
        return {
            "round": number,
            "history": list(progress.history),
            "train_config": dict(self.train_config),
            "evaluate_config": dict(self.evaluate_config),
            "partition": {
                "number": len(self.local.partition),
                "sha256": self.local.partition.sha256,
            },
            "clients": {client: one._asdict() for client, one in sorted(progress.states.items())},
            "measured": dict(sorted(progress.measured.items())),
            "scores": self.training.checkpointing.scores.state_dict(),
        }

    def _events(self) -> Any:
        loggers = self.training.trainer.loggers
        [events] = [one for one in loggers if isinstance(one, RunTensorBoardLogger)]
        return events.counted()

    def preflight(self) -> None:
        """What would make the first save fail is said before the first round."""
        state, _ = self._made("preflight", None)
        self.saver.preflight(state, 0, alone=True)

    def derive(self) -> None:
        """After a save: which states it names, and what other programs read of the run."""
        kept = {one.step for one in self.saver.store.checkpoints()}
        now = {client: one.round for client, one in self.progress.states.items()}
        tables = {**self._tables, self.progress.round: now}
        self._tables = {step: table for step, table in tables.items() if step in kept}
        self.write_results()

    def write_results(self) -> None:
        given = self.config.data.get("init_args") or {}
        batch_size = given.get("batch_size")
        lr = learning_rate(self.config)
        names = getattr(self.training.data, "classes", None) or range(self._counts.shape[1])
        results.write(
            self.training.run.directory,
            self.progress.history,
            results.run_config(self.federation, lr, batch_size),
            results.described_clients(self._counts, list(map(str, names)), self.progress.measured),
        )


def _plain(metrics: MetricRecord | None) -> dict[str, Any]:
    return {} if metrics is None else dict(metrics)


def _number(content: Any, key: str) -> float:
    [metrics] = content.metric_records.values()
    return float(metrics[key])

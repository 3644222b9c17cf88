"""What a round of a federated run costs: the in-process runtime by part, with a thousand clients;
and beside it three programs for plain Flower with Ray that save nothing and sample once, on the
same data, batches and epochs: a Trainer in each message, as Flower's quickstart for Lightning has
it; a plain torch loop, as that for PyTorch; and our own clients' training. CPU seconds, of all
processes, are what to compare where other work shares the cores. Needs `make extras-federated`.

python benchmarks/federated.py
python benchmarks/federated.py --clients 1000 --rounds 10 --beside 1000 --beside-rounds 4
"""

import argparse
import copy
import csv
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

with warnings.catch_warnings(action="ignore"):
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg

import project  # noqa: F401
from savepoint.config import typed
from savepoint.federated import client_app, listing, ray_runtime, runtime
from savepoint.federated.clients import ClientStates
from savepoint.federated.messages import arrays_of, tensors_of
from savepoint.federated.server import Server
from savepoint.federated.training import LocalTraining, Weights
from savepoint.training import threads
from savepoint.words import table

Spent = tuple[float, float]
PARTS = ("train", "aggregate", "clients", "server")


def config(folder: Path, clients: int, rounds: int, *flags: str) -> Any:
    given = {
        "num_clients": clients,
        "num_server_rounds": rounds,
        "fraction_train": 0.1,
        "fraction_evaluate": 0.1,
        "personal": "[net.classify]",
        "partitioner": "Iid",
    }
    words = [word for key, value in given.items() for word in (f"--federated.{key}", str(value))]
    base = ["--config", "configs/federated/mnist.yaml", "--output_dir", str(folder)]
    return typed.parse([*base, "--run_name", f"{clients}", *words, *flags])


def scale(folder: Path, clients: int, rounds: int) -> list[tuple[str, str]]:
    """A whole run, with client states."""
    cpu = time.process_time()
    began = time.monotonic()
    assert runtime.train(config(folder, clients, rounds), "federated") == 0
    directory = folder / str(clients)
    with (directory / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["time/train_secs"]]
    files = list((directory / "clients").rglob("*.ckpt"))
    counted = listing.summary(directory)
    assert counted is not None
    found = [(f"{clients} clients, {rounds} rounds, 10 %", "")]
    found += [
        (
            f"  {part}, median s a round",
            f"{statistics.median(float(r[f'time/{part}_secs']) for r in rows):.2f}",
        )
        for part in PARTS
    ]
    found += [
        (
            "  whole run, wall s / cpu s",
            f"{time.monotonic() - began:.0f} / {time.process_time() - cpu:.0f}",
        ),
        ("  files of clients", f"{len(files)} of {counted['clients']} clients"),
        ("  their bytes", f"{sum(path.stat().st_size for path in files) / 1e6:.1f} MB"),
        (
            "  a server checkpoint",
            f"{max(p.stat().st_size for p in (directory / 'checkpoints').glob('step-*')) / 1e6:.2f} MB",
        ),
    ]
    return found


def listed(folder: Path, clients: int) -> list[tuple[str, str]]:
    """How long it takes to list so many clients, each with one small state."""
    states = ClientStates([folder / "clients"], 0)
    states.save({"state_dict": {}}, 1, "run")
    whole = states.directory / "step-00000001.ckpt"
    for number in range(1, clients):
        place = folder / "clients" / f"partition-{number:05d}"
        place.mkdir()
        (place / whole.name).hardlink_to(whole)
    began = time.perf_counter()
    counted = listing.summary(folder)
    assert counted is not None
    assert counted["clients"] == clients
    return [(f"{clients} clients listed, s", f"{time.perf_counter() - began:.2f}")]


def spent() -> Spent:
    """Seconds on the clock, and of CPU in this process and all below it."""
    hertz = os.sysconf("SC_CLK_TCK")
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            words = path.read_text().rpartition(") ")[2].split()
            parents[int(path.parent.name)] = int(words[1])
            used[int(path.parent.name)] = sum(map(int, words[11:15])) / hertz
    ours = {os.getpid()}
    while more := {one for one, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return time.monotonic(), sum(used[one] for one in ours)


def a_round(seen: list[Spent]) -> Spent:
    """The median on the clock, and of CPU, from one to the next."""
    pairs = list(itertools.pairwise(seen))
    wall, cpu = (statistics.median(b[one] - a[one] for a, b in pairs) for one in (0, 1))
    return wall, cpu


def in_process(folder: Path, clients: int, rounds: int) -> Spent:
    """Of a round, saves and evaluations included, without the first. With one thread, as each of
    Flower's clients has: two that wait for a busy core would count as work.
    """
    seen: list[Spent] = []

    def how(server: Server) -> None:
        end = server.saver.end_round

        def one(*given: Any) -> None:
            end(*given)
            seen.append(spent())

        server.saver.end_round = one  # type: ignore[method-assign]
        runtime.play(server)

    runtime.train(config(folder, clients, rounds, "--threads", "1"), "federated", how=how)
    return a_round(seen)


class OurOwn:
    """A client's work as Savepoint's clients do it."""

    def __init__(self, local: LocalTraining) -> None:
        self.local = local

    def train(self, client: int, received: Weights) -> tuple[Weights, int]:
        done = self.local.train(client, 1, received, {})
        return done.weights, done.samples

    def evaluate(self, client: int, received: Weights) -> tuple[dict[str, float], int]:
        return self.local.evaluate(client, 1, received, {})


class TrainerEach:
    """As Flower's quickstart for Lightning has it: a Trainer in each message. Its logger and its
    checkpoints, which a Trainer has by default, are left out.
    """

    def __init__(self, local: LocalTraining) -> None:
        self.local = local

    def model(self, received: Weights) -> Any:
        model = copy.deepcopy(self.local.model)
        model.load_state_dict({**model.state_dict(), **received})
        return model

    def trainer(self) -> Trainer:
        epochs = self.local.federation.local_epochs
        return Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            enable_checkpointing=False,
        )

    def loader(self, client: int, seed: int | None) -> Any:
        division = self.local.partition
        indices = division.test(client) if seed is None else division.train(client)
        return cast(Any, self.local.data).part(indices, seed)

    def train(self, client: int, received: Weights) -> tuple[Weights, int]:
        model = self.model(received)
        self.trainer().fit(model, self.loader(client, 1))
        return model.state_dict(), len(self.local.partition.train(client))

    def evaluate(self, client: int, received: Weights) -> tuple[dict[str, float], int]:
        model = self.model(received)
        [found] = self.trainer().validate(model, self.loader(client, None), verbose=False)
        return dict(found), len(self.local.partition.test(client))


class PlainLoop(TrainerEach):
    """As Flower's quickstart for PyTorch has it: a loop over the batches, without Lightning."""

    def train(self, client: int, received: Weights) -> tuple[Weights, int]:
        model = self.model(received).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        for _ in range(self.local.federation.local_epochs):
            for images, labels in self.loader(client, 1):
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
        return model.state_dict(), len(self.local.partition.train(client))

    def evaluate(self, client: int, received: Weights) -> tuple[dict[str, float], int]:
        model = self.model(received).eval()
        loss, right, samples = 0.0, 0, 0
        with torch.no_grad():
            for images, labels in self.loader(client, None):
                logits = model(images)
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
                right += int((logits.argmax(1) == labels).sum())
                samples += len(labels)
        return {"val/loss": loss / samples, "val/accuracy": right / samples}, samples


def plain_ray(folder: Path, clients: int, rounds: int, kind: type[Any]) -> tuple[float, float]:
    """The same trainings and evaluations by Flower's FedAvg with Ray; nothing is saved. Seconds a
    round on the clock, and of CPU in all processes.
    """
    made = config(folder, clients, rounds)
    text = typed.dump(made)
    app = ClientApp()

    def local() -> LocalTraining:
        if text not in client_app._trainings:
            client_app.use(text, LocalTraining(typed.parse([], base=text)))
            threads.use(1)
        return client_app._trainings[text]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        received = tensors_of(message.content["arrays"], local().model.state_dict())
        weights, samples = kind(local()).train(int(context.node_config["partition-id"]), received)
        record = {"arrays": arrays_of(weights), "m": MetricRecord({"num-examples": samples})}
        return Message(RecordDict(record), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        received = tensors_of(message.content["arrays"], local().model.state_dict())
        client = int(context.node_config["partition-id"])
        found, samples = kind(local()).evaluate(client, received)
        metrics = MetricRecord({"num-examples": samples, **found})
        return Message(RecordDict({"m": metrics}), reply_to=message)

    seen: list[Spent] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        def evaluated(number: int, arrays: ArrayRecord) -> None:
            local().validate(number, tensors_of(arrays, local().model.state_dict()))
            seen.append(spent())

        strategy = FedAvg(fraction_train=0.1, fraction_evaluate=0.1)
        arrays = arrays_of(local().model.state_dict())
        strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=evaluated)

    ray_runtime.simulate(server, app, clients, made)
    return a_round(seen[1:])


RIVALS = {
    "Flower with Ray, a Trainer a message": TrainerEach,
    "Flower with Ray, a plain torch loop": PlainLoop,
    "Flower with Ray, our own training": OurOwn,
}


def compared(
    clients: int, rounds: int, rivals: int = len(RIVALS)
) -> list[tuple[str, float, float]]:
    """Seconds a round on the clock, and of CPU in all processes: in this process, then each of the
    rivals.
    """
    with tempfile.TemporaryDirectory(prefix="savepoint-federated-") as name:
        folder = Path(name)
        found = [("in this process", *in_process(folder / "ours", clients, rounds))]
        for number, (rival, kind) in enumerate(list(RIVALS.items())[:rivals]):
            given = (folder / f"theirs{number}", clients, rounds, kind)
            found.append((rival, *plain_ray(*given)))
    return found


def beside(clients: int, rounds: int) -> list[tuple[str, str]]:
    """Seconds a round, and how many times as long as in this process."""
    (_, *ours), *rivals = compared(clients, rounds)
    title = f"{clients} clients, a round, median of {rounds - 1}"
    rows = [
        (title, "wall s / cpu s of all processes"),
        ("  in this process, saves included", f"{ours[0]:.2f} / {ours[1]:.2f}"),
    ]
    for name, *theirs in rivals:
        times = f"{theirs[0] / ours[0]:.1f}x / {theirs[1] / ours[1]:.1f}x"
        rows.append((f"  {name}, nothing saved", f"{theirs[0]:.2f} / {theirs[1]:.2f}: {times}"))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--beside", type=int, default=100, help="clients beside plain Flower; 0: none"
    )
    parser.add_argument("--beside-rounds", type=int, default=6)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="savepoint-federated-"))
    try:
        rows = scale(folder, arguments.clients, arguments.rounds)
        rows += listed(folder / "many", 10_000)
        if arguments.beside:
            rows += beside(arguments.beside, arguments.beside_rounds)
        print(table((), rows))
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

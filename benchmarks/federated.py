"""What a round of a federated run costs: the in-process runtime by part, with a thousand clients;
and plain Flower with Ray on the same work, without saves. Needs `make extras-federated`.

python benchmarks/federated.py
python benchmarks/federated.py --clients 1000 --rounds 10 --beside 20
"""

import argparse
import csv
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from savepoint.federated.training import LocalTraining
from savepoint.words import table

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


@contextmanager
def timed(seen: list[float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    seen.append(time.monotonic() - began)


def in_process(folder: Path, clients: int, rounds: int) -> float:
    """Seconds a round, saves and evaluations included, without the first."""
    seen: list[float] = []

    def how(server: Server) -> None:
        play = server._play

        def one(asking: Any) -> None:
            with timed(seen):
                play(asking)

        server._play = one  # type: ignore[method-assign]
        runtime.play(server)

    runtime.train(config(folder, clients, rounds), "federated", how=how)
    return statistics.median(seen[1:])


def plain_ray(folder: Path, clients: int, rounds: int) -> float:
    """The same training and evaluation by Flower's FedAvg with Ray, nothing saved or sampled anew."""
    made = config(folder, clients, rounds)
    text = typed.dump(made)
    app = ClientApp()

    def local() -> LocalTraining:
        if text not in client_app._trainings:
            client_app.use(text, LocalTraining(typed.parse([], base=text)))
        return client_app._trainings[text]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        here = local()
        weights = tensors_of(message.content["arrays"], here.model.state_dict())
        done = here.train(int(context.node_config["partition-id"]), 1, weights, {})
        metrics = MetricRecord({"num-examples": done.samples, "loss": done.metrics["train/loss"]})
        return Message(
            RecordDict({"arrays": arrays_of(done.weights), "m": metrics}), reply_to=message
        )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        here = local()
        weights = tensors_of(message.content["arrays"], here.model.state_dict())
        found, samples = here.evaluate(int(context.node_config["partition-id"]), 1, weights, {})
        metrics = MetricRecord({"num-examples": samples, **found})
        return Message(RecordDict({"m": metrics}), reply_to=message)

    seen: list[float] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        last = [time.monotonic()]

        def evaluated(number: int, arrays: ArrayRecord) -> None:
            local().validate(number, tensors_of(arrays, local().model.state_dict()))
            seen.append(time.monotonic() - last[0])
            last[0] = time.monotonic()

        strategy = FedAvg(fraction_train=0.1, fraction_evaluate=0.1)
        arrays = arrays_of(local().model.state_dict())
        strategy.start(grid, arrays, num_rounds=rounds, evaluate_fn=evaluated)

    ray_runtime.simulate(server, app, clients, made)
    return statistics.median(seen[2:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument(
        "--beside", type=int, default=100, help="clients beside plain Flower; 0: none"
    )
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="savepoint-federated-"))
    try:
        rows = scale(folder, arguments.clients, arguments.rounds)
        rows += listed(folder / "many", 10_000)
        if arguments.beside:
            ours = in_process(folder / "ours", arguments.beside, 4)
            theirs = plain_ray(folder / "theirs", arguments.beside, 4)
            rows += [
                (
                    f"{arguments.beside} clients, s a round in this process, saves included",
                    f"{ours:.2f}",
                )
            ]
            rows += [("  plain Flower with Ray, nothing saved", f"{theirs:.2f}")]
            rows += [("  plain Flower / in this process", f"{theirs / ours:.1f}x")]
        print(table((), rows))
    finally:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

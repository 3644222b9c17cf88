"""Flower's own processes on loopback: a SuperLink with TLS and two SuperNodes with keys. All files
lie below one folder, keys included, and are made anew each time.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from support.limits import HANG_SECS, LONGER_SECS

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def environment(home: Path) -> dict[str, str]:
    """Flower's daemons and clients find the same code, and call nobody."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def call(*command: str, at: Path, env: dict[str, str], check: bool = True) -> str:
    done = subprocess.run(
        command, cwd=at, env=env, capture_output=True, text=True, timeout=LONGER_SECS, check=False
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


class Deployment:
    """Two SuperNodes, each with a folder of its own for the state of its client."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.env = environment(folder / "home")
        (folder / "home").mkdir(parents=True)
        self._certificates()
        (folder / "home" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\n'
            f'root-certificates = "{folder / "ca.pem"}"\n'
        )

    def _certificates(self) -> None:
        self._openssl(
            "req -x509 -newkey rsa:2048 -nodes -days 1 -keyout ca.key -out ca.pem -subj /CN=tests"
        )
        self._openssl(
            "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=localhost"
        )
        (self.folder / "ext").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        signed = "-CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -extfile ext -out server.pem"
        self._openssl(f"x509 -req -in server.csr {signed}")
        for number in range(2):
            key = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f", f"node{number}"]
            call(*key, at=self.folder, env=self.env)

    def _openssl(self, words: str) -> None:
        call("openssl", *words.split(), at=self.folder, env=self.env)

    @contextmanager
    def superlink(self) -> Iterator[subprocess.Popen[bytes]]:
        tls = "--ssl-ca-certfile ca.pem --ssl-certfile server.pem --ssl-keyfile server.key"
        words = (
            f"{tls} --enable-supernode-auth --database {self.folder / 'link.db'} --port {self.port}"
        )
        with self._started("flower-superlink", words.split(), "superlink") as process:
            until = time.monotonic() + HANG_SECS
            look = [str(BIN / "flwr"), "supernode", "list", "here"]
            while subprocess.run(look, cwd=ROOT, env=self.env, capture_output=True).returncode:
                assert time.monotonic() < until
                assert process.poll() is None, (self.folder / "superlink.log").read_text()
                time.sleep(0.5)
            yield process

    def register(self) -> None:
        for number in range(2):
            self.flwr("supernode", "register", str(self.folder / f"node{number}.pub"), "here")

    @contextmanager
    def supernodes(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        with ExitStack() as stack:
            yield [stack.enter_context(self.supernode(number)) for number in range(2)]

    def supernode(self, number: int) -> AbstractContextManager[subprocess.Popen[bytes]]:
        config = f"partition-id={number} num-partitions=2 client-state-dir='{self.folder / f'states{number}'}'"
        tls = ["--root-certificates", "ca.pem", "--auth-supernode-private-key", f"node{number}"]
        where = [
            "--superlink",
            f"127.0.0.1:{self.port}",
            "--host",
            "127.0.0.1",
            "--port",
            str(free_port()),
        ]
        return self._started(
            "flower-supernode", [*tls, *where, "--node-config", config], f"node{number}"
        )

    @contextmanager
    def _started(
        self, program: str, words: list[str], name: str
    ) -> Iterator[subprocess.Popen[bytes]]:
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / program), *words], cwd=self.folder, env=self.env, stdout=log, stderr=log
            )
            try:
                yield process
            finally:
                process.terminate()
                process.wait(HANG_SECS)

    @contextmanager
    def run(self, given: str) -> Iterator[subprocess.Popen[bytes]]:
        """`flwr run`, which streams what the app prints into flwr.log."""
        words = ["run", ".", "here", "--stream", "--run-config", given]
        with (self.folder / "flwr.log").open("ab") as log:
            process = subprocess.Popen(
                [str(BIN / "flwr"), *words], cwd=ROOT, env=self.env, stdout=log, stderr=log
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait(HANG_SECS)

    def wait_until(self, holds: Callable[[], Any]) -> None:
        until = time.monotonic() + HANG_SECS
        while not holds():
            assert time.monotonic() < until, (self.folder / "flwr.log").read_text()
            time.sleep(0.1)

    def flwr(self, *words: str, check: bool = True) -> str:
        return call(str(BIN / "flwr"), *words, at=ROOT, env=self.env, check=check)

    def status(self) -> str:
        found = json.loads(self.flwr("ls", "here", "--format", "json"))
        return str(found["runs"][0]["status"])


def processes(env: dict[str, str], *programs: str) -> list[int]:
    """Of these programs, those that run with this home of Flower's, by their ids."""
    home = f"FLWR_HOME={env['FLWR_HOME']}"
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if home in variables and any(word.endswith(programs) for word in words):
            found.append(int(folder.name))
    return found


def stop_daemon(env: dict[str, str]) -> None:
    """Ends the local SuperLink that `flwr run` has left."""
    for pid in processes(env, "flower-superlink", "flower-superexec"):
        os.kill(pid, signal.SIGTERM)

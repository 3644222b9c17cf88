"""The state of one client, version by version, as sealed files. No Flower.

    clients/partition-00012/step-00000005.ckpt      what client 12 keeps, after round 5
    clients/partition-00012/model-00000005.ckpt     its whole model; only where the config asks

The server's checkpoint names the round and the content digest of each client's newest state, and
sends them to the client. So a client never decides which version counts: one that a dead start has
left behind is not named by the checkpoint that the run goes on from, and is never used.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from savepoint import files
from savepoint.checkpoint import manifest, store
from savepoint.errors import CheckpointError, ClientStateError

FOLDER = "clients"
_PREFIX = "partition-"


class Version(NamedTuple):
    """A state of a client: after which round, and the digest of its content."""

    round: int
    digest: str


class ClientStates:
    """The versions of one client.

    Args:
        roots: Folders with a folder for each client: the first is written to, the others, of the
            runs that this one was forked from, are only looked at.
    """

    def __init__(self, roots: Sequence[Path], client: int) -> None:
        self.client = client
        self.directories = [root / folder_name(client) for root in roots]

    @property
    def directory(self) -> Path:
        return self.directories[0]

    def find(self, version: Version) -> Path:
        """Its file, judged by the manifest.

        Raises:
            ClientStateError: It is lost, or another one stands in its place.
        """
        reasons = []
        for directory in self.directories:
            path = directory / _name("step", version.round)
            try:
                found = manifest.read(path)["digest"]
            except (CheckpointError, OSError) as error:
                reasons.append(getattr(error, "reason", "") or _reason(path, error))
                continue
            if found == version.digest:
                return path
            reasons.append("another state stands there")
        raise self._refusal(self.directory / _name("step", version.round), reasons[0])

    def load(self, version: Version) -> Mapping[str, Any]:
        """Its content, after a look at every byte. No older version is taken in its place.

        Raises:
            ClientStateError: It is lost, damaged or another one.
        """
        path = self.find(version)
        try:
            return store.load(path)[0]
        except (CheckpointError, OSError) as error:
            reason = getattr(error, "reason", "") or _reason(path, error)
            raise self._refusal(path, reason) from error

    def _refusal(self, path: Path, reason: str) -> ClientStateError:
        return ClientStateError(
            f"The state of client {self.client} is not the one that the server's checkpoint names: "
            f"{path} ({reason}). A resume goes on with the very states of that round. Put a copy "
            "back, or let such clients begin anew: --allow clients"
        )

    def save(
        self, state: Mapping[str, Any], server_round: int, run_id: str, keep: Collection[int] = ()
    ) -> Version:
        """Writes the version of a round, whole and durable, then deletes those that no checkpoint
        of the server names.

        Args:
            keep: The rounds of the versions that are still named.

        Raises:
            CheckpointSaveError: The version of before is intact.
        """
        self.sweep()
        path = self.directory / _name("step", server_round)
        written = store.write(path, state, _facts(self.client, server_round, run_id))
        # A crash here costs disk space until the client's next save.
        self.prune({*keep, server_round})
        return Version(server_round, written.manifest["digest"])

    def save_model(self, state: Mapping[str, Any], server_round: int, run_id: str) -> Path:
        """Writes its whole model, which nothing deletes."""
        path = self.directory / _name("model", server_round)
        facts = _facts(self.client, server_round, run_id)
        return store.write(path, state, facts).path

    def prune(self, keep: Collection[int]) -> list[Path]:
        """Deletes the versions of other rounds."""
        gone = [path for number, path in self.versions() if number not in keep]
        for path in gone:
            with files.saving(path):
                path.unlink(missing_ok=True)
        return gone

    def sweep(self) -> None:
        """Deletes what a dead process was writing here. One client is trained by one process."""
        if self.directory.is_dir():
            for path in files.stale_temps(self.directory):
                path.unlink(missing_ok=True)

    def versions(self) -> list[tuple[int, Path]]:
        """(round, file) of each, by round; by their names alone."""
        paths = manifest.step_files(self.directory)
        found = ((manifest.step_in_name(path.name), path) for path in paths)
        return sorted((number, path) for number, path in found if number is not None)

    def adopt(self, version: Version) -> Path:
        """Gives a version of a run that this one was forked from a name here: a link, or a copy."""
        path = self.find(version)
        target = self.directory / path.name
        if path != target:
            files.make_directory(self.directory)
            files.point(target, path, lambda one, other: False)
        return target


def folder_name(client: int) -> str:
    return f"{_PREFIX}{client:05d}"


def in_directory(root: Path) -> Iterator[ClientStates]:
    """The clients that have a folder below `root`, by number."""
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    for name in filter(is_client, names):
        yield ClientStates([root], int(name.removeprefix(_PREFIX)))


def is_client(name: str) -> bool:
    """Whether a folder has the name of a client's."""
    return name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdecimal()


def _name(kind: str, server_round: int) -> str:
    return f"{kind}-{server_round:08d}.ckpt"


def _reason(path: Path, error: Exception) -> str:
    return "it is not there" if not path.exists() else str(error)


def _facts(client: int, server_round: int, run_id: str) -> dict[str, Any]:
    return {
        "step": server_round,
        "epoch": server_round,
        "kind": "client",
        "client": client,
        "run_id": run_id,
        "at": "round",
        "exact": True,
        "reason": "round",
        "ended": None,
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }

"""The clients of a run, as commands look at them: by the names of their files, and whole. No
Flower, and no torch but for what checkpoints name.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from savepoint.checkpoint import manifest, store
from savepoint.errors import CheckpointError, ClientStateError
from savepoint.federated import clients
from savepoint.federated.clients import Version


def root_of(directory: Path) -> Path:
    """The folder of the clients of a run."""
    return directory / clients.FOLDER


def summary(directory: Path) -> dict[str, int] | None:
    """How many states of how many clients a run has, and the newest round; None where it has none.
    Of ten thousand clients in a second: no file is opened.
    """
    root = root_of(directory)
    if not root.is_dir():
        return None
    found = {"clients": 0, "states": 0, "newest_round": 0}
    with os.scandir(root) as folders:
        for folder in folders:
            if not clients.is_client(folder.name):
                continue
            with os.scandir(folder) as files:
                steps = [manifest.step_in_name(file.name) for file in files]
            rounds = [one for one in steps if one is not None]
            found["clients"] += bool(rounds)
            found["states"] += len(rounds)
            found["newest_round"] = max([found["newest_round"], *rounds])
    return found


def versions_of(state: Mapping[str, Any]) -> dict[int, Version]:
    """The newest state of each client that a server's checkpoint names."""
    saved = state.get("federated", {}).get("clients", {})
    return {int(client): Version(**one) for client, one in saved.items()}


def damaged(directory: Path) -> Iterator[tuple[Path, str]]:
    """Each state that does not verify, after a look at every byte."""
    for one in clients.in_directory(root_of(directory)):
        for _, path in one.versions():
            try:
                manifest.verify(path)
            except CheckpointError:
                yield path, manifest.diagnose(path)
            except OSError as error:
                yield path, f"cannot be read: {error.strerror}"


def lost(directory: Path, checkpoint: Path) -> Iterator[tuple[int, str]]:
    """Each client whose state is not the one that a checkpoint names, and why."""
    for client, version in versions_of(store.load(checkpoint)[0]).items():
        try:
            clients.ClientStates([root_of(directory)], client).find(version)
        except ClientStateError as error:
            yield client, str(error)


def orphans(directory: Path, kept: Iterator[Path]) -> list[Path]:
    """The states that none of the kept checkpoints names."""
    named: dict[int, set[int]] = {}
    for path in kept:
        for client, version in versions_of(store.load(path)[0]).items():
            named.setdefault(client, set()).add(version.round)
    return [
        path
        for one in clients.in_directory(root_of(directory))
        for number, path in one.versions()
        if number not in named.get(one.client, ())
    ]

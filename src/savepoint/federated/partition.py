"""How a training set is divided among clients: indices from its labels, a number and a seed. NumPy
only.
"""

import hashlib
import inspect
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from savepoint.errors import ConfigError
from savepoint.federated.federation import Component, component, refuse_texts
from savepoint.words import nearest

Indices = NDArray[np.int64]
MOST_SECS = 10.0  # that a division may be looked for


class Partitioner(Protocol):
    def split(self, labels: Indices, number: int, seed: int) -> list[Indices]:
        """The indices of each part, each index once."""


class Iid:
    """Equal parts, drawn at random."""

    def split(self, labels: Indices, number: int, seed: int) -> list[Indices]:
        order = np.random.RandomState(seed).permutation(len(labels))
        return [np.sort(part) for part in np.array_split(order, number)]


class ByLabel:
    """Each client has a few labels only: the training set, sorted by label, is cut into shards.

    Args:
        shards: That each client gets.

    Source: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
    Data", section 3.
    """

    def __init__(self, shards: int = 2) -> None:
        if shards < 1:
            raise ConfigError(f"Too few: shards is {shards}. Each client needs 1 or more.")
        self.shards = shards

    def split(self, labels: Indices, number: int, seed: int) -> list[Indices]:
        shards = np.array_split(np.argsort(labels, kind="stable"), number * self.shards)
        order = np.random.RandomState(seed).permutation(len(shards))
        parts = [order[n * self.shards : (n + 1) * self.shards] for n in range(number)]
        return [np.sort(np.concatenate([shards[one] for one in part])) for part in parts]


class Dirichlet:
    """The share of each client in a label is drawn from a Dirichlet distribution.

    Args:
        alpha: Small: each client has few labels and its own number of samples; large: all alike.
        min_partition_size: Drawn again until every client has so many samples.

    Source: Yurochkin et al., "Bayesian Nonparametric Federated Learning of Neural Networks".
    """

    def __init__(self, alpha: float = 0.3, min_partition_size: int = 10) -> None:
        if alpha <= 0:
            raise ConfigError(f"Too small: alpha is {alpha}. Expected more than 0.")
        self.alpha = alpha
        self.min_partition_size = min_partition_size

    def split(self, labels: Indices, number: int, seed: int) -> list[Indices]:
        draw = np.random.RandomState(seed)
        of_label = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        until = time.monotonic() + MOST_SECS
        best = 0
        if self.min_partition_size * number <= len(labels):
            while time.monotonic() < until:
                parts = self._drawn(of_label, number, draw)
                best = max(best, min(map(len, parts)))
                if best >= self.min_partition_size:
                    return parts
        raise ConfigError(
            f"No such division was found: {len(labels)} samples in {number} parts with alpha "
            f"{self.alpha}, each of {self.min_partition_size} or more (the smallest had {best} "
            f"at best, in {MOST_SECS:.0f} s). Give a larger --federated.partitioner.alpha, a "
            "smaller --federated.partitioner.min_partition_size or fewer --federated.num_clients."
        )

    def _drawn(
        self, of_label: Sequence[Indices], number: int, draw: np.random.RandomState
    ) -> list[Indices]:
        owner = [np.empty(0, np.int64)]
        index = [np.empty(0, np.int64)]
        for indices in of_label:
            shares = draw.dirichlet(np.full(number, self.alpha))
            ends = (np.cumsum(shares)[:-1] * len(indices)).astype(np.int64)
            counts = np.diff(ends, prepend=0, append=len(indices))
            owner.append(np.repeat(np.arange(number), counts))
            index.append(draw.permutation(indices))
        owners = np.concatenate(owner)
        order = np.lexsort((np.concatenate(index), owners))
        ends = np.cumsum(np.bincount(owners, minlength=number))[:-1]
        return np.split(np.concatenate(index)[order], ends)


KNOWN: dict[str, type] = {kind.__name__: kind for kind in (Dirichlet, Iid, ByLabel)}


class Partition:
    """Which samples each client has: to train on, and to evaluate on.

    Attributes:
        sha256: Of all indices: another data set, number, partitioner or seed gives another one.
    """

    def __init__(
        self, labels: Any, given: Component, number: int, test_fraction: float, seed: int
    ) -> None:
        self.labels = np.asarray(labels, np.int64)
        if len(self.labels) < 2 * number:
            raise ConfigError(
                f"Too many clients: federated.num_clients is {number} for {len(self.labels)} "
                "samples. Each client needs two or more. Give fewer: --federated.num_clients N"
            )
        parts = partitioner(given).split(self.labels, number, seed)
        if (smallest := min(map(len, parts))) < 2:
            raise ConfigError(
                f"Too few samples for a client: {smallest}. Each needs two or more: one to train "
                "on, one to evaluate on. Give fewer --federated.num_clients, or another "
                "--federated.partitioner."
            )
        self.sha256 = _digest(parts)
        self._train: list[Indices] = []
        self._test: list[Indices] = []
        draw = np.random.RandomState((seed + 1) % 2**32)
        for part in parts:
            order = draw.permutation(part)
            held_out = round(test_fraction * len(part))
            if test_fraction:
                held_out = min(max(1, held_out), len(part) - 1)
            self._test.append(np.sort(order[:held_out]))
            self._train.append(np.sort(order[held_out:]))

    def __len__(self) -> int:
        return len(self._train)

    def train(self, client: int) -> Indices:
        return self._train[client]

    def test(self, client: int) -> Indices:
        return self._test[client]

    def sizes(self) -> list[int]:
        """Samples of each client, those to evaluate on included."""
        pairs = zip(self._train, self._test, strict=True)
        return [len(train) + len(test) for train, test in pairs]

    def counts(self) -> NDArray[np.int64]:
        """(clients, labels): how many samples of each label a client has."""
        kinds = int(self.labels.max()) + 1
        pairs = zip(self._train, self._test, strict=True)
        rows = [np.bincount(self.labels[np.concatenate(pair)], minlength=kinds) for pair in pairs]
        return np.stack(rows)


def partitioner(given: Component) -> Partitioner:
    """Raises ConfigError for a name that is not known, or arguments that it does not take."""
    key = "federated.partitioner"
    name, arguments = component(given, key)
    short = name.rpartition(".")[2]
    if short not in KNOWN:
        near = nearest(short, KNOWN) or f" It is none of {', '.join(KNOWN)}."
        raise ConfigError(f"No such class for {key}: {name}.{near}")
    known = inspect.signature(KNOWN[short]).parameters
    for argument in arguments:
        if argument not in known:
            near = nearest(argument, known) or f" {short} takes {', '.join(known) or 'none'}."
            raise ConfigError(f"Unknown key: {key}.{argument}.{near}")
    refuse_texts(KNOWN[short], arguments, key)
    made: Partitioner = KNOWN[short](**arguments)
    return made


def _digest(parts: Sequence[Indices]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part.astype("<i8").tobytes())
    return total.hexdigest()

"""Models, data and strategies that keep something where few would look for it. Needs Flower."""

import copy
import itertools
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR, StepLR
from torch.utils.data import DataLoader, TensorDataset

from project.data import ImageData
from project.model import Batch, ImageClassifier

# -- models --------------------------------------------------------------------------------------


class Buffers(ImageClassifier):
    """Of whole numbers, of truth values, in no state_dict; and a plain count."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.register_buffer("smooth", torch.zeros(1), persistent=False)
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.count = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.count += 1
        self.steps += 1
        self.smooth.mul_(0.9).add_(0.1)
        factor = 1 + 0.1 * float(self.smooth) + 0.01 * self.count
        return super().training_step(batch, batch_idx) * factor


class OwnGenerators(ImageClassifier):
    """Seeded by nobody."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.numpy = np.random.default_rng()
        self.torch = torch.Generator()
        self.torch.seed()
        self.python = random.Random()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        drawn = self.numpy.random() + self.python.random()
        drawn += float(torch.rand(1, generator=self.torch))
        return super().training_step(batch, batch_idx) * (1 + 0.1 * drawn)


class Dropouts(ImageClassifier):
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.drop = nn.Dropout(0.3)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels = batch
        return super().training_step((self.drop(images.float()), labels), batch_idx)


class TwoOptimizers(ImageClassifier):
    """Stepped by hand, each with a schedule."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, *others = self.net.parameters()
        one, two = SGD([first], 0.05, momentum=0.9), Adam(others, 1e-3)
        return [one, two], [OneCycleLR(one, 0.1, total_steps=99), StepLR(two, 1, 0.5)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        for schedule in self.lr_schedulers():
            schedule.step()


class Sequence(ImageClassifier):
    """A schedule of two schedules."""

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), 0.05, momentum=0.9)
        parts = [LinearLR(optimizer, total_iters=1), CosineAnnealingLR(optimizer, 50)]
        schedule = SequentialLR(optimizer, parts, [1])
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Teacher(ImageClassifier):
    """Moving averages of the weights: one in the state_dict, one in a list."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self.hidden = [copy.deepcopy(self.net).requires_grad_(False)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        images = batch[0].float() / 255
        for teacher in (self.average, *self.hidden):
            loss = loss + 0.1 * F.mse_loss(self.net(images), teacher(images))
            with torch.no_grad():
                for its, now in zip(teacher.parameters(), self.net.parameters(), strict=True):
                    its.lerp_(now, 0.1)
        return loss


class Counting(ImageClassifier):
    """Keeps a state of its own: in how many rounds it has trained."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.visits = 0

    def on_train_start(self) -> None:
        self.visits += 1

    def client_state(self) -> dict[str, int]:
        return {"visits": self.visits}

    def load_client_state(self, state: dict[str, int]) -> None:
        self.visits = state["visits"]


class Memory(ImageClassifier):
    """A state of many kinds."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.memory: dict[Any, Any] = {"drawn": [], 3: np.zeros(2), "rounds": {0}, "t": (1, "x")}
        self.own = np.random.default_rng(3)

    def on_train_start(self) -> None:
        self.memory["drawn"].append(self.own.random())
        self.memory[3] += 1
        self.memory["rounds"].add(len(self.memory["drawn"]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * (1 + sum(self.memory["drawn"]))

    def client_state(self) -> Any:
        return {"memory": self.memory, "own": self.own.bit_generator.state}

    def load_client_state(self, state: Any) -> None:
        self.memory = state["memory"]
        self.own.bit_generator.state = state["own"]


class Forgets(ImageClassifier):
    def client_state(self) -> Any:
        return {"x": 1}


class Odd(Counting):
    def client_state(self) -> Any:
        return {"handle": object()}


class OnItsClass(ImageClassifier):
    """What all clients of a process share."""

    calls = 0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        type(self).calls += 1
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.calls)


class Batches(Callback):
    """Counts those of one training."""

    def __init__(self) -> None:
        self.number = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        assert self.number == 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.number += 1


MODELS = [Buffers, OwnGenerators, Dropouts, TwoOptimizers, Sequence, Teacher]

# -- data ----------------------------------------------------------------------------------------


class OwnOrder(ImageData):
    """Draws from a generator that all clients of a process share."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.generator = np.random.default_rng()

    def part(self, indices: Any, seed: int | None) -> Any:
        drawn = indices if seed is None else self.generator.permutation(indices)
        return super().part(drawn, seed)


class PlainLoader(ImageData):
    def part(self, indices: Any, seed: int | None) -> Any:
        self.setup()
        assert self._once is not None
        data = self._once.pick(indices)
        return DataLoader(
            TensorDataset(data.images, data.labels), batch_size=32, shuffle=seed is not None
        )


class ReadsAnew(ImageData):
    """Whatever is there already."""

    def setup(self, stage: str | None = None) -> None:
        if stage is not None:
            self._parts = {}
            self.pixels = torch.zeros(2**19)
        super().setup(stage)


class GoesByCalls(ImageData):
    """More samples at each call, whoever asks."""

    calls = 0

    def part(self, indices: Any, seed: int | None) -> Any:
        self.calls += 1
        return super().part(indices[: 20 + self.calls], seed)


# -- strategies ----------------------------------------------------------------------------------

_total = Counter[str]()


def counter() -> Callable[[], int]:
    seen = [0]
    total = 0

    def count() -> int:
        nonlocal total
        seen[0] += 1
        total += 2
        return seen[0] + total

    return count


class Helper:
    def __init__(self) -> None:
        self.calls = 0
        self.drift = np.zeros(2)

    def next(self) -> int:
        self.calls += 1
        self.drift += 1
        return self.calls


class Scales(FedAvg):
    """Multiplies the mean by a number that goes by what it keeps."""

    def number(self, server_round: int, replies: list[Any]) -> float:
        raise NotImplementedError

    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        replies = list(replies)
        arrays, metrics = super().aggregate_train(server_round, replies)
        assert arrays is not None
        factor = 1 + 0.01 * self.number(server_round, replies)
        return ArrayRecord({name: _times(one, factor) for name, one in arrays.items()}), metrics


def _times(array: Array, factor: float) -> Array:
    values = array.numpy()
    return Array(np.asarray(values * factor).astype(values.dtype))


class Closure(Scales):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.count = counter()

    def number(self, server_round: int, replies: list[Any]) -> float:
        return self.count()


class OfAnObject(Scales):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.next = Helper().next

    def number(self, server_round: int, replies: list[Any]) -> float:
        return self.next()


class Layer(Scales):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.gate = nn.Linear(1, 1)

    def number(self, server_round: int, replies: list[Any]) -> float:
        with torch.no_grad():
            self.gate.bias += 1
        return float(self.gate.bias.detach())


class Seeded(Scales):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.numpy = np.random.default_rng(1)
        self.python = random.Random(2)
        self.torch = torch.Generator().manual_seed(3)

    def number(self, server_round: int, replies: list[Any]) -> float:
        drawn = float(torch.rand(1, generator=self.torch))
        return self.numpy.random() + self.python.random() + drawn


class Alias(Scales):
    """One array in two attributes."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.one: Any = None
        self.other: Any = None

    def number(self, server_round: int, replies: list[Any]) -> float:
        if self.one is None:
            self.one = self.other = np.zeros(2)
        self.one += 1
        return float(self.other[0])


class Deletes(Scales):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.warm = True

    def number(self, server_round: int, replies: list[Any]) -> float:
        if server_round == 1:
            del self.warm
        return float(hasattr(self, "warm"))


class Histories(Scales):
    """Records, lists of arrays, dicts in dicts."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.history: list[tuple[int, Any]] = []
        self.tree: dict[Any, Any] = {"a": {"b": []}, 3: (1, [2])}

    def number(self, server_round: int, replies: list[Any]) -> float:
        metrics = MetricRecord({"replies": len(replies)})
        self.history.append((server_round, replies[0].content["arrays"]))
        self.history.append((server_round, metrics))
        self.tree["a"]["b"].append(np.ones(server_round))
        self.tree[3][1].append(server_round)
        return len(self.history) + sum(self.tree[3][1])


class ByClient(Scales):
    """Keeps something of each client."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.rounds: dict[int, int] = {}

    def number(self, server_round: int, replies: list[Any]) -> float:
        clients = [reply.metadata.src_node_id for reply in replies]
        for one in clients:
            self.rounds[one] = self.rounds.get(one, 0) + one
        return sum(self.rounds[one] for one in clients)


class Measures(FedAvg):
    """Metrics by a function that remembers."""

    def __init__(self, **arguments: Any) -> None:
        best = [0.0]

        def worst(records: Any, key: str) -> MetricRecord:
            losses = [float(record["metrics"]["train/loss"]) for record in records]
            best[0] = max(best[0], *losses)
            return MetricRecord({"train/worst": best[0]})

        super().__init__(**{**arguments, "train_metrics_aggr_fn": worst})


STRATEGIES = [
    Closure, OfAnObject, Layer, Seeded, Alias, Deletes, Histories, ByClient, Measures,
]  # fmt: skip


class Iterates(Scales):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.numbers = itertools.count()

    def number(self, server_round: int, replies: list[Any]) -> float:
        return next(self.numbers)


class Shares(Scales):
    seen: list[int] = []  # noqa: RUF012 - the mistake that many make

    def number(self, server_round: int, replies: list[Any]) -> float:
        self.seen.append(server_round)
        return len(self.seen)


class Counts(Scales):
    def number(self, server_round: int, replies: list[Any]) -> float:
        _total["rounds"] += 1
        return _total["rounds"]


class Optimizes(Scales):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.optimizer: Any = None

    def number(self, server_round: int, replies: list[Any]) -> float:
        self.optimizer = SGD([nn.Parameter(torch.ones(1))], 0.1)
        return 0.0


INEXACT = {
    Iterates: "strategy.numbers (an iterator (count))",
    Shares: "Shares.seen (shared by all that use it)",
    Counts: "unusual._total (shared by all that use it)",
    Optimizes: "strategy.optimizer (a new SGD)",
}

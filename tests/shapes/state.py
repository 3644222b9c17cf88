"""What a module holds beside its parameters: counters, buffers, generators, helpers, teachers."""

import copy
import random
import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass, field
from datetime import date, timedelta
from enum import IntEnum
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from shapes.base import Manual, Net, Shape


class Held(Net):
    """Holds one value, changed by each batch, that scales the loss."""

    def __init__(self, value: Any, change: Any, scale: Any) -> None:
        super().__init__()
        self.value, self.change, self.scale = copy.deepcopy(value), change, scale

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        replaced = self.change(self.value, batch_idx, batch)
        if replaced is not None:
            self.value = replaced
        return super().training_step(batch, batch_idx) * (1 + 0.01 * float(self.scale(self.value)))


def add(value: Any, i: int, batch: Any) -> Any:
    return value + 1


def append(value: Any, i: int, batch: Any) -> None:
    value.append(i)


def in_dict(value: Any, i: int, batch: Any) -> None:
    value[i % 3] = value.get(i % 3, 0) + 1


def count_up(value: Any, i: int, batch: Any) -> None:
    value[i % 3] += 1


def nested(value: Any, i: int, batch: Any) -> None:
    value["seen"][0].append((i, {"mean": float(batch[0].mean())}))
    value["last"] = {"x": batch[0].clone(), "names": {str(i)}}


def add_array(value: Any, i: int, batch: Any) -> None:
    value += batch[0].mean(0).numpy()


def add_tensor(value: Any, i: int, batch: Any) -> None:
    value.add_(batch[0].mean(0))


def add_to_data(value: Any, i: int, batch: Any) -> None:
    value.data.add_(1)


def replace_tensor(value: Any, i: int, batch: Any) -> Any:
    return 0.9 * value + 0.1 * batch[0].mean(0)


def keep_batches(value: Any, i: int, batch: Any) -> None:
    value.append((batch[0].mean(), i))


def summed(value: Any) -> float:
    return float(sum(value.values()))


def draw_numpy(value: Any, i: int, batch: Any) -> None:
    batch[0].add_(float(value.normal()) * 0.1)


def draw_torch(value: Any, i: int, batch: Any) -> None:
    batch[0].add_(0.1 * torch.randn(batch[0].shape, generator=value))


def draw_random(value: Any, i: int, batch: Any) -> None:
    batch[0].add_(0.1 * value.gauss(0, 1))


def none(value: Any) -> float:
    return 0.0


def total(value: Any) -> float:
    return float(value.sum())


HELD: dict[str, tuple[Any, Any, Any]] = {
    "int": (0, add, float),
    "float": (0.5, lambda v, i, b: 0.9 * v + float(b[0].mean()), float),
    "string": ("", lambda v, i, b: v[-5:] + str(i), len),
    "bool": (False, lambda v, i, b: not v, float),
    "none_then_tensor": (None, lambda v, i, b: b[0].mean(), none),
    "list": ([], append, len),
    "dict": ({}, in_dict, summed),
    "set": (set(), lambda v, i, b: v.add(len(v)), len),
    "tuple": ((), lambda v, i, b: (*v[-3:], i), sum),
    "deque": (deque(maxlen=6), append, sum),
    "defaultdict": (defaultdict(int), count_up, summed),
    "counter": (Counter(), count_up, summed),
    "nested": ({"seen": [[]]}, nested, lambda v: len(v["seen"][0])),
    "array": (np.zeros(4), add_array, total),
    "array_replaced": (np.zeros(4), lambda v, i, b: v + b[0].mean(0).numpy(), total),
    "tensor": (torch.zeros(4), add_tensor, total),
    "tensor_replaced": (torch.zeros(4), replace_tensor, total),
    "tensor_through_data": (torch.zeros(4), add_to_data, total),
    "batches": (deque(maxlen=9), keep_batches, lambda v: sum(float(x) for x, _ in v)),
    "numpy_generator": (np.random.default_rng(0), draw_numpy, none),
    "random_state": (np.random.RandomState(0), draw_numpy, none),
    "random": (random.Random(0), draw_random, none),
    "big_int": (2**80, add, lambda v: float(v - 2**80)),
}  # fmt: skip


class Move(NamedTuple):
    x: Tensor
    worth: float


class Step(IntEnum):
    FIRST, SECOND, THIRD = range(3)


def remember(value: Any, i: int, batch: Any) -> None:
    value.extend(Move(x, float(y)) for x, y in zip(*batch, strict=True))


def recent(value: Any, i: int, batch: Any) -> None:
    inner = value.setdefault(i % 2, OrderedDict())
    inner[i % 5] = i
    inner.move_to_end(i % 5)


def count_far(value: Any, i: int, batch: Any) -> None:
    value[7 * i + 3] += 1


HELD |= {
    "moves": (deque(maxlen=50), remember, lambda v: sum(move.worth for move in v)),
    "last_move": (None, lambda v, i, b: Move(b[0], (v.worth if v else 0) + 1), lambda v: v.worth),
    "ordered_dicts": ({}, recent, lambda v: sum(sum(inner) for inner in v.values())),
    "nested_defaultdict": (
        defaultdict(lambda: defaultdict(int)),
        lambda v, i, b: count_up(v[i % 2], i, b),
        lambda v: sum(map(summed, v.values())),
    ),
    "enum": (Step.FIRST, lambda v, i, b: Step((v + 1) % 3), float),
    "none_then_enum": (None, lambda v, i, b: Step(((v or 0) + 1) % 3), float),
    "fraction": (Fraction(1, 2), lambda v, i, b: v + Fraction(1, 3), float),
    "date": (date(2020, 1, 1), lambda v, i, b: v + timedelta(days=1), lambda v: v.day),
    "range": (range(0), lambda v, i, b: range(len(v) + 1), len),
    "bytearray": (bytearray(), lambda v, i, b: v.append(i), len),
    "array_array": (array("d"), append, len),
    "records_array": (np.zeros(3, [("a", "f4"), ("n", "i4")]), lambda v, i, b: count_up(v["n"], i, b),
                      lambda v: v["n"].sum()),
    "masked_array": (np.ma.masked_array(np.ones(9), np.zeros(9, bool)),
                     lambda v, i, b: v.__setitem__(i % 5, np.ma.masked), lambda v: float(v.sum())),
    "object_array": (np.array([0, "a", None], object), lambda v, i, b: v.__setitem__(0, v[0] + 1), lambda v: v[0]),
    "large_array": (np.zeros(400_000, np.float32), count_far, total),
    "large_list": ([0] * 150_000, count_far, sum),
    "bit_generator": (np.random.PCG64(4), lambda v, i, b: draw_numpy(np.random.Generator(v), i, b), none),
    "seed_sequence": (np.random.SeedSequence(3),
                      lambda v, i, b: draw_numpy(np.random.default_rng(v.spawn(1)[0]), i, b), none),
    "generator_with_children": (np.random.default_rng(0), lambda v, i, b: draw_numpy(v.spawn(1)[0], i, b), none),
}  # fmt: skip


class Perturbs(Manual):
    """Inputs are moved by a tensor with a gradient that is summed up, made when it is first needed."""

    def __init__(self) -> None:
        super().__init__()
        self.away: Any = None

    def loss(self, batch: Any) -> Tensor:
        if not self.training:
            return super().loss(batch)
        if self.away is None:
            self.away = torch.zeros(4, requires_grad=True)
        elif self.away.grad is not None:
            self.away.data.add_(self.away.grad, alpha=0.01)
        return nn.functional.mse_loss(self(batch[0] + self.away), batch[1])


class PrivateSlots:
    __slots__ = ("__count",)

    def __init__(self) -> None:
        self.__count = 0

    def up(self) -> int:
        self.__count += 1
        return self.__count


class CountsInSlots(Net):
    def __init__(self) -> None:
        super().__init__()
        self.counter = PrivateSlots()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) / self.counter.up()


class Generating(Net):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        draw_torch(self.generator, batch_idx, batch)
        return super().training_step(batch, batch_idx)


class Replay:
    """A replay buffer as an object of its own."""

    def __init__(self) -> None:
        self.items: list[Tensor] = []
        self.rng = random.Random(1)

    def exchange(self, x: Tensor) -> Tensor:
        self.items.append(x.detach().clone())
        return self.rng.choice(self.items)


class Replays(Net):
    def __init__(self) -> None:
        super().__init__()
        self.replay = Replay()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        old = self.replay.exchange(batch[0])
        return super().training_step(batch, batch_idx) + self(old).pow(2).mean() * 0.1


class Shadow:
    """An average of weights as many write it."""

    def __init__(self, module: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    def update(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            self.shadow[name].lerp_(parameter.detach(), 0.1)


class Shadowed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.average = Shadow(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        bias = self.average.shadow["0.bias"].sum()
        return super().training_step(batch, batch_idx) * (1 + 0.1 * bias)

    def on_train_batch_end(self, *args: Any) -> None:
        self.average.update(self.net)


class Teacher(Net):
    """A slow copy that is no sub-module: `hold` puts it where it is not seen."""

    def __init__(self, hold: Any) -> None:
        super().__init__()
        self.teacher = hold(copy.deepcopy(self.net).requires_grad_(False))

    def _module(self) -> Any:
        held = self.teacher
        return held["t"] if isinstance(held, dict) else held[0]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        teacher = self._module()
        loss = super().training_step(batch, batch_idx)
        return loss + nn.functional.mse_loss(self(batch[0]), teacher(batch[0]))

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for slow, fast in zip(self._module().parameters(), self.net.parameters(), strict=True):
                slow.lerp_(fast, 0.05)


class RegisteredTeacher(Net):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def on_train_batch_end(self, *args: Any) -> None:
        for slow, fast in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            slow.data.lerp_(fast.data, 0.05)


class Centered(Net):
    """A running mean in a buffer that `state_dict` leaves out."""

    def __init__(self, persistent: bool, replace: bool = False) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4), persistent=persistent)
        self.replace = replace

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.mse_loss(self(batch[0] - self.mean), batch[1])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        new = 0.9 * self.mean + 0.1 * batch[0].mean(0)
        if self.replace:
            self.mean = new
        else:
            self.mean.copy_(new)


class RegisteredLate(Net):
    """A buffer that the first batch makes, and that `state_dict` leaves out."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.zeros(4), persistent=False)
        self.late += batch[0].mean(0)
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.late.sum())


class Queue(nn.Module):
    """A sub-module with a buffer left out, and a place in it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(8, 4), persistent=False)
        self.place = 0

    def push(self, x: Tensor) -> None:
        self.keys[self.place] = x
        self.place = (self.place + 1) % 8


class Contrasts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.queue = Queue()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) + self(self.queue.keys.clone()).pow(2).mean()
        self.queue.push(batch[0][0])
        return loss


class ValidationCounts(Net):
    """What validations do to the module."""

    def __init__(self) -> None:
        super().__init__()
        self.validations, self.best, self.since = 0, float("inf"), 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) / (1 + self.since + self.validations)

    def on_validation_start(self) -> None:
        self.validations += 1

    def on_validation_epoch_end(self) -> None:
        value = float(self.trainer.callback_metrics["val/loss"])
        self.since = 0 if value < self.best else self.since + 1
        self.best = min(self.best, value)


class Freezes(Net):
    """Freezes, or thaws, its first layer in `hook` of the second epoch."""

    def __init__(self, hook: str, thaw: bool = False) -> None:
        super().__init__()
        self.hook, self.thaw = hook, thaw
        if thaw:
            self.net[0].requires_grad_(False)

    def _in(self, hook: str) -> None:
        if hook == self.hook and self.current_epoch == 1:
            self.net[0].requires_grad_(self.thaw)

    def on_train_epoch_start(self) -> None:
        self._in("epoch")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self._in("batch")

    def on_validation_epoch_end(self) -> None:
        self._in("validation")


class FreezingCallback(Callback):
    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.current_epoch == 1:
            module.net[2].requires_grad_(False)


class Dropped(Net):
    def __init__(self, change: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(4, 8),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(8, 1),
        )
        self.change = change

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 4:
            self.change(self)


def more_dropout(module: Any) -> None:
    module.net[3].p = min(module.net[3].p + 0.2, 0.8)


def still_norm(module: Any) -> None:
    module.net[1].eval()


def slower_norm(module: Any) -> None:
    module.net[1].momentum = 0.01


class HyperParameters(Net):
    def __init__(self, rate: float = 1.0, names: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.hparams.rate *= 0.95
        return super().training_step(batch, batch_idx) * self.hparams.rate


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.outer(self.inner(x)))


class Wrapped(Net):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.net[0] = wrap(self.net[0])


class Lazy(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(1))
        self.net(torch.zeros(1, 4))


class MadeLate(Net):
    """Layers made in `hook`."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook, self.net = hook, None

    def setup(self, stage: str) -> None:
        if self.hook == "setup":
            self._make()

    def configure_model(self) -> None:
        if self.hook == "configure":
            self._make()

    def _make(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))


class ExtraState(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x) * (1 + 0.01 * self.calls)

    def get_extra_state(self) -> Any:
        return {"calls": self.calls, "name": "extra"}

    def set_extra_state(self, state: Any) -> None:
        self.calls = state["calls"]


class WithExtraState(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = ExtraState(4, 8)


class OwnHooks(Net):
    """Saves and loads what it counts by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        return super().training_step(batch, batch_idx) / self.batches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches"] = self.batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.batches = checkpoint["batches"]


class LeavesOut(Net):
    """A frozen part that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.strict_loading = False

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.frozen(x))

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        whole = super().state_dict(*args, **kwargs)
        return {name: value for name, value in whole.items() if "frozen" not in name}


class ClassLevel(Net):
    """Counts in its class."""

    batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        type(self).batches += 1
        return super().training_step(batch, batch_idx) / (1 + 0.1 * ClassLevel.batches)


SEEN: list[int] = []


class Global(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        SEEN.append(batch_idx)
        return super().training_step(batch, batch_idx) / (1 + 0.1 * len(SEEN))


class Meter:
    def __init__(self) -> None:
        self.count = 0


METER = Meter()


def count_all(seen: list[int] = []) -> int:  # noqa: B006 - its default is its memory
    seen.append(1)
    METER.count += 1
    count_all.calls += 1  # type: ignore[attr-defined]
    return len(seen)


def forget() -> None:
    count_all.__defaults__[0].clear()  # type: ignore[index]
    METER.count = count_all.calls = 0  # type: ignore[attr-defined]


forget()


class Shared(Net):
    """Counts in an object of its module, in a default, in a function's attribute; the function is
    called by its name.
    """

    def __init__(self, scale: Any) -> None:
        super().__init__()
        self.scale = scale

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        count_all()
        return super().training_step(batch, batch_idx) / (1 + 0.1 * self.scale())


class HooksCount(Net):
    """Hooks of a layer, a weight, the optimizer, and a schedule's function, each with a count that
    nobody else holds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.net[0].register_forward_hook(counting(lambda n, layer, x, y: y * (1 + 0.001 * n)))
        self.net[2].weight.register_hook(counting(lambda n, gradient: gradient / n))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        optimizer.register_step_post_hook(counting(self.shift))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, counting(lambda n, step: 1 / n))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def shift(self, n: int, *args: Any) -> None:
        self.net[2].bias.data += 0.001 * n


def counting(function: Any) -> Any:
    calls = 0

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(calls, *args)

    return counted


class HookedLate(Net):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].weight.register_hook(lambda gradient: gradient * 0.1)


class HoldsAnything(Net):
    """Values that no file can hold; none of them is state."""

    def __init__(self) -> None:
        super().__init__()
        self.file = sys.__stderr__
        self.function, self.numbers = lambda x: x, iter(range(1000))
        self.partial, self.module = partial(max, 1), torch
        self.me, self.stream = self.forward, (i for i in range(1000))


class Iterates(Net):
    """An iterator is state."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = (1 / (1 + i) for i in range(1000))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * next(self.numbers)


@dataclass
class Progress:
    seen: int = 0
    losses: list[float] = field(default_factory=list)


class Records(Net):
    def __init__(self) -> None:
        super().__init__()
        self.progress_so_far = Progress()
        self.alias = self.progress_so_far.losses

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.progress_so_far.seen += 1
        self.alias.append(float(loss.detach()))
        return loss * (1 + self.progress_so_far.losses[-1] / self.progress_so_far.seen)


class OwnOptimizer(Net):
    """Steps an optimizer of its own over a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.ones(1, requires_grad=True)
        self.inner = torch.optim.Adam([self.scale], lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.inner.zero_grad()
        (self.scale - batch[1].mean()).pow(2).sum().backward()
        self.inner.step()
        return super().training_step(batch, batch_idx) * self.scale.detach().item()


class MadeWhenNeeded(Net):
    """What the first batch makes, a resume does not."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.scale, self.make, self.made = torch.ones(1, requires_grad=True), make, None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.made = self.made or self.make(self.scale)
        if isinstance(self.made, SimpleNamespace):
            self.made.count += 1
            return super().training_step(batch, batch_idx) / self.made.count
        self.made.zero_grad()
        (self.scale - batch[1].mean()).pow(2).sum().backward()
        self.made.step()
        return super().training_step(batch, batch_idx) * self.scale.item()


class Compiled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(self.net, backend="eager")


class Recomputes(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(lambda y: self.net(self.drop(y)), x, use_reentrant=False)


class Variational(Net):
    """A forward that draws, with an example input."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.rand(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.1 * torch.randn_like(x))


class ListOfModules(Net):
    """Whichever of its parts is drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(random.choice(list(self.parts))(x))


def with_example(make: Any) -> Any:
    """The same model with an example input, which the outputs of a file are compared on."""

    def made() -> Any:
        model = make()
        model.example_input_array = torch.linspace(-1, 1, 8).view(2, 4)
        return model

    return made


class OddBuffer(Net):
    def __init__(self, tensor: Any) -> None:
        super().__init__()
        self.register_buffer("odd", tensor)


class Listed(Net):
    """Counts in an attribute with a name that frameworks use too."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.called = name
        setattr(self, name, [])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        held = getattr(self, self.called)
        held.append(batch_idx)
        return super().training_step(batch, batch_idx) * (1 + 0.1 * len(held))


def value(model: Any, trainer: Trainer) -> Any:
    held = model.value
    if isinstance(held, np.random.Generator):
        return str(held.bit_generator.state)
    if isinstance(held, random.Random):
        return held.getstate()
    if isinstance(held, np.random.BitGenerator | np.random.SeedSequence):
        return str(held.state)
    kinds = int | float | str | list | dict | set | tuple | deque | np.ndarray | Tensor
    return held if isinstance(held, kinds) else None


def own(*names: str) -> Any:
    return lambda model, trainer: [getattr(model, name) for name in names]


INTERVAL = {"val_check_interval": 3}


class Anchored(Net):
    """Copies of the weights, made when the training starts: of those that a resume has loaded, they
    would be others.
    """

    def on_fit_start(self) -> None:
        self.teacher = [copy.deepcopy(self.net)]

    def on_train_start(self) -> None:
        self.anchor = self.net[0].weight.detach().clone()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        away = (self.net[0].weight - self.anchor).square().sum()
        teacher = (self.net(batch[0]) - self.teacher[0](batch[0])).square().mean()
        return super().training_step(batch, batch_idx) + 0.1 * away + teacher


class View(Net):
    """One attribute is a view of the other."""

    def __init__(self, *, late: bool) -> None:
        super().__init__()
        self.bank = self.row = None
        if not late:
            self.make()

    def make(self) -> None:
        self.bank = torch.zeros(3, 4)
        self.row = self.bank[1]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.bank is None:
            self.make()
        self.row.add_(batch[0].mean(0))
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.bank.sum())


SHAPES = {
    f"held_{name}": Shape(model=lambda parts=parts: Held(*parts), extra=value)
    for name, parts in HELD.items()
}  # fmt: skip
SHAPES |= {
    "anchored": Shape(model=Anchored, extra=lambda m, t: m.anchor),
    "perturbs": Shape(model=Perturbs, extra=own("away")),
    "counts_in_slots": Shape(model=CountsInSlots),
    "held_torch_generator": Shape(model=Generating, extra=lambda m, t: m.generator.get_state()),
    "held_int_interval": Shape(model=lambda: Held(0, add, float), extra=value, trainer=INTERVAL),
    "held_int_accumulate": Shape(
        model=lambda: Held(0, add, float),
        extra=value,
        trainer={"accumulate_grad_batches": 3},
    ),
    "replay": Shape(model=Replays, extra=lambda m, t: m.replay.items),
    "shadow": Shape(model=Shadowed, extra=lambda m, t: m.average.shadow),
    "shadow_interval": Shape(model=Shadowed, trainer=INTERVAL),
    "teacher_in_a_list": Shape(model=lambda: Teacher(lambda t: [t])),
    "teacher_in_a_tuple": Shape(model=lambda: Teacher(lambda t: (t,))),
    "teacher_in_a_dict": Shape(model=lambda: Teacher(lambda t: {"t": t})),
    "teacher_registered": Shape(model=RegisteredTeacher),
    "buffer_left_out": Shape(model=lambda: Centered(False), extra=own("mean")),
    "buffer_left_out_interval": Shape(model=lambda: Centered(False), trainer=INTERVAL),
    "buffer_left_out_replaced": Shape(model=lambda: Centered(False, True), extra=own("mean")),
    "buffer_kept": Shape(model=lambda: Centered(True)),
    "buffer_left_out_64": Shape(
        model=lambda: Centered(False),
        extra=own("mean"),
        trainer={"precision": "64-true"},
    ),
    "buffer_registered_late": Shape(model=RegisteredLate, extra=own("late")),
    "queue": Shape(model=Contrasts, extra=lambda m, t: [m.queue.keys, m.queue.place]),
    "validation_counts": Shape(model=ValidationCounts, extra=own("validations", "best", "since")),
    "validation_counts_interval": Shape(
        model=ValidationCounts,
        extra=own("validations", "best", "since"),
        trainer=INTERVAL,
    ),
    "freezes_epoch": Shape(model=lambda: Freezes("epoch")),
    "freezes_batch": Shape(model=lambda: Freezes("batch")),
    "freezes_validation": Shape(model=lambda: Freezes("validation"), trainer=INTERVAL),
    "thaws_epoch": Shape(model=lambda: Freezes("epoch", thaw=True)),
    "freezing_callback": Shape(callbacks=lambda: [FreezingCallback()]),
    "dropout_scheduled": Shape(model=lambda: Dropped(more_dropout)),
    "norm_in_eval": Shape(model=lambda: Dropped(still_norm)),
    "norm_in_eval_interval": Shape(model=lambda: Dropped(still_norm), trainer=INTERVAL),
    "norm_momentum": Shape(model=lambda: Dropped(slower_norm)),
    "hyper_parameters": Shape(model=HyperParameters, extra=lambda m, t: m.hparams.rate),
    "hyper_parameter_nan": Shape(model=lambda: HyperParameters(names=[float("nan")])),
    "tied": Shape(model=Tied),
    "spectral_norm": Shape(
        model=lambda: Wrapped(nn.utils.parametrizations.spectral_norm),
        trainer=INTERVAL,
    ),
    "weight_norm": Shape(model=lambda: Wrapped(nn.utils.parametrizations.weight_norm)),
    "spectral_norm_hook": Shape(model=lambda: Wrapped(nn.utils.spectral_norm)),
    "lazy": Shape(model=Lazy),
    "made_in_setup": Shape(model=lambda: MadeLate("setup")),
    "made_in_configure_model": Shape(model=lambda: MadeLate("configure")),
    "extra_state": Shape(model=WithExtraState),
    "own_hooks": Shape(model=OwnHooks, extra=own("batches")),
    "own_hooks_interval": Shape(model=OwnHooks, extra=own("batches"), trainer=INTERVAL),
    "leaves_out": Shape(model=LeavesOut),
    "class_level": Shape(model=ClassLevel, reset=lambda: setattr(ClassLevel, "batches", 0)),
    "global": Shape(model=Global, reset=SEEN.clear),
    "shared_object": Shape(model=lambda: Shared(lambda: METER.count), reset=forget),
    "hooks_count": Shape(model=HooksCount),
    "hooked_late": Shape(model=HookedLate),
    "holds_anything": Shape(model=HoldsAnything),
    "iterates": Shape(model=Iterates),
    "records": Shape(model=Records, extra=lambda m, t: vars(m.progress_so_far)),
    "optimizer_made_when_needed": Shape(
        model=lambda: MadeWhenNeeded(lambda scale: torch.optim.Adam([scale]))
    ),
    "object_made_when_needed": Shape(
        model=lambda: MadeWhenNeeded(lambda scale: SimpleNamespace(count=1))
    ),
    "own_optimizer": Shape(model=OwnOptimizer, extra=own("scale")),
    "compiled": Shape(model=Compiled),
    "recomputes": Shape(model=Recomputes),
    "variational": Shape(model=Variational, trainer=INTERVAL),
    "list_of_modules": Shape(model=ListOfModules),
}
EXAMPLES = {
    "leaves_out": LeavesOut,
    "made_in_setup": lambda: MadeLate("setup"),
    "made_in_configure_model": lambda: MadeLate("configure"),
    "extra_state": WithExtraState,
    "compiled": Compiled,
    "spectral_norm": lambda: Wrapped(nn.utils.parametrizations.spectral_norm),
    "buffer_left_out": lambda: Centered(False),
    "teacher_in_a_list": lambda: Teacher(lambda t: [t]),
    "norm_in_eval": lambda: Dropped(still_norm),
}
SHAPES |= {
    f"{name}_example": Shape(model=with_example(make), trainer=INTERVAL)
    for name, make in EXAMPLES.items()
}  # fmt: skip
BUFFERS = {
    "float8": lambda: torch.ones(3).to(torch.float8_e4m3fn),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "complex": lambda: torch.ones(3, dtype=torch.complex64),
    "bool": lambda: torch.tensor([True, False]),
    "infinite": lambda: torch.full((3,), -float("inf")),
    "empty": lambda: torch.empty(0),
}
SHAPES |= {
    f"buffer_{name}": Shape(model=lambda make=make: OddBuffer(make()))
    for name, make in BUFFERS.items()
}  # fmt: skip
NAMES = ("data", "grad", "_cache", "_groups", "update", "_metadata")
SHAPES |= {
    f"attribute_called_{name}": Shape(model=lambda name=name: Listed(name))
    for name in NAMES
}  # fmt: skip
SHAPES |= {
    f"view{'_made_late' * late}": Shape(model=lambda late=late: View(late=late))
    for late in (False, True)
}  # fmt: skip

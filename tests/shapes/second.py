"""State in places that strangers choose: odd values, aliases, globals, descriptors, the process."""

import contextvars
import ctypes
import functools
import heapq
import itertools
import math
import multiprocessing
import operator
import os
import queue
import random
import threading
import types
import weakref
from collections import ChainMap, OrderedDict, UserDict, UserList, defaultdict
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import shapes
from shapes.base import Net, Shape
from shapes.state import Held, none, own, total


def held(value: Any, change: Any, scale: Any = none, **arguments: Any) -> Shape:
    return Shape(model=lambda: Held(value, change, scale), **arguments)


def made(make: Any, change: Any, scale: Any = none, **arguments: Any) -> Shape:
    """As `held`, of what cannot be copied."""

    def model() -> Any:
        net = Held(None, change, scale)
        net.value = make()
        return net

    return Shape(model=model, **arguments)


# -- values ---------------------------------------------------------------------------------------


class Celsius(float):
    """A number of a class of its own."""


class Tag(str):
    __slots__ = ()


class CountingRandom(random.Random):
    calls = 0

    def draw(self) -> float:
        self.calls += 1
        return self.random() / self.calls


class Tally(dict[Any, Any]):
    """What is written into it is written as text."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value * 2)


class Lru(OrderedDict[Any, Any]):
    """The newest last, the oldest falls out."""

    def __getitem__(self, key: Any) -> Any:
        self.move_to_end(key)
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(key, value)
        self.move_to_end(key)
        if len(self) > 4:
            self.popitem(last=False)


class Episode(list[Any]):
    """A list with an attribute."""

    reward = 0.0


class Clipped(np.ndarray):
    """An array of a class of its own."""


class Tagged(Tensor):
    """A tensor of a class of its own."""


class Running:
    """An iterator whose state is plain."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> "Running":
        return self

    def __next__(self) -> int:
        self.place += 1
        return self.place


def scaled(batch: Any, factor: float) -> None:
    batch[0].mul_(factor)


def add_ctypes(value: Any, i: int, batch: Any) -> None:
    value.value += 1


def spend(value: set[int], i: int, batch: Any) -> None:
    batch[0].mul_(1 + 0.01 * value.pop())
    if len(value) < 5:
        value.update(range(60))


def shrink(value: set[int], i: int, batch: Any) -> None:
    """The table of a set stays as large as it was: its order goes by that."""
    if len(value) > 4:
        for number in sorted(value)[2:-1]:
            value.discard(number)
    value.add((i * 37 + 8) % 59)
    batch[0].mul_(1 + 0.01 * next(iter(value)))


def put_into_local(value: Any, i: int, batch: Any) -> None:
    value.count = getattr(value, "count", 0) + 1


def set_variable(value: Any, i: int, batch: Any) -> None:
    value.set(value.get() + 1)


def turn(value: Any, i: int, batch: Any) -> None:
    value.put(value.get() + i)


def turn_and_use(value: Any, i: int, batch: Any) -> None:
    value.put(value.get() + i)
    value.put(value.get())
    scaled(batch, 1 + value.qsize() / 10)
    number = value.get()
    scaled(batch, 1 / (1 + 0.1 * number))
    value.put(number)


def push(value: Any, i: int, batch: Any) -> None:
    heapq.heappush(value, (float(batch[1].mean()), i, {"n": i}))
    if len(value) > 5:
        heapq.heappop(value)


def priority(value: Any, i: int, batch: Any) -> None:
    value[-1 - i % 3].worth += 1


def in_lambda_dict(value: Any, i: int, batch: Any) -> None:
    value[i % 4].append(i)


def in_lru(value: Any, i: int, batch: Any) -> None:
    value[i % 7] = i
    _ = value[next(iter(value))]


def tallied(value: Any, i: int, batch: Any) -> None:
    value[i % 3] = value.get(i % 3, 0) % 7 + 1


def fortran(value: Any, i: int, batch: Any) -> Any:
    """Its order in memory decides how it is summed up."""
    x = batch[0].numpy()
    return 0.5 * value + (np.outer(x, x).astype(np.float32) ** 3)[:, :13].T


def transposed(value: Any, i: int, batch: Any) -> Any:
    return 0.5 * value + torch.outer(batch[0].flatten(), batch[0].flatten())[:, :13].t()


def end_episode(value: Any, i: int, batch: Any) -> None:
    episode = Episode([i])
    episode.reward = float(batch[1].mean())
    value.append(episode)
    value[-1].reward += 1
    del value[:-5]


def vocabulary() -> Any:
    words: Any = defaultdict(lambda: len(words))
    return words


def read_words(value: Any, i: int, batch: Any) -> None:
    for number in (batch[0] * 100).int().flatten().tolist():
        _ = value[f"w{number}"]


def ring(value: Any, i: int, batch: Any) -> None:
    value["place"] = (value["place"] + 1) % 3
    value["rows"][value["place"]] = {"x": batch[0].mean(0), "n": i}


def distribution(value: Any, i: int, batch: Any) -> Any:
    return torch.distributions.Normal(0.5 * value.loc + batch[0].mean(0), batch[0].std(0) + 0.1)


def field_array(value: Any, i: int, batch: Any) -> None:
    value[i % 5] = (i, batch[0][0].numpy(), float(batch[1].mean()))


TRANSITIONS = np.dtype([("i", "i8"), ("x", "f4", (4,)), ("r", "f8")])

SHAPES = {
    "float_subclass": held(Celsius(0.5), lambda v, i, b: Celsius(v + 0.1), float),
    "str_subclass": held(Tag(""), lambda v, i, b: Tag(v[-5:] + str(i)), len),
    "random_subclass": held(CountingRandom(0), lambda v, i, b: scaled(b, 1 + v.draw()), none),
    "dict_subclass_writes_double": held(Tally(), tallied, lambda v: sum(v.values())),
    "lru": held(Lru(), in_lru, lambda v: next(iter(v)), extra=lambda m, t: list(m.value.items())),
    "episodes_of_lists": held([], end_episode, lambda v: sum(e.reward for e in v)),
    "array_subclass": held(np.zeros(4).view(Clipped), lambda v, i, b: v + b[0].mean(0).numpy(), total),
    "tensor_subclass": made(lambda: torch.zeros(4).as_subclass(Tagged), lambda v, i, b: v + 0.1, total),
    "tensor_subclass_in_place": made(lambda: torch.zeros(4).as_subclass(Tagged),
                                     lambda v, i, b: v.add_(0.1), total),
    "own_iterator": held(Running(), lambda v, i, b: scaled(b, 1 / next(v)), none),
    "count": made(itertools.count, lambda v, i, b: scaled(b, 1 / (1 + next(v)))),
    "cycle": made(lambda: itertools.cycle([1, 2, 3]), lambda v, i, b: scaled(b, 1 / next(v))),
    "generator_function": made(lambda: (1 / (1 + i) for i in range(1000)), lambda v, i, b: scaled(b, next(v))),
    "ctypes": made(lambda: ctypes.c_int(0), add_ctypes, lambda v: v.value),
    "ctypes_array": made(lambda: (ctypes.c_double * 3)(), lambda v, i, b: operator.setitem(v, i % 3, v[i % 3] + i),
                         lambda v: sum(v)),
    "shared_value": made(lambda: multiprocessing.Value("i", 0), add_ctypes, lambda v: v.value),
    "shared_array": made(lambda: multiprocessing.Array("d", 3), lambda v, i, b: operator.setitem(v, i % 3, v[i % 3] + i),
                         lambda v: sum(v[:])),
    "thread_local": made(threading.local, put_into_local, lambda v: v.count),
    "context_variable": made(lambda: contextvars.ContextVar("own", default=0),
                             set_variable, lambda v: v.get()),
    "queue": made(lambda: (lambda q: (q.put(1), q)[1])(queue.Queue()), turn, lambda v: v.queue[0]),
    "simple_queue": made(lambda: (lambda q: (q.put(1), q)[1])(queue.SimpleQueue()), turn_and_use),
    "priority_queue": made(queue.PriorityQueue, lambda v, i, b: v.put((i % 3, i)), lambda v: v.queue[0][1]),
    "heap": held([], push, lambda v: v[0][0]),
    "set_spent": held(set(range(60)), spend, len, extra=lambda m, t: list(m.value)),
    "set_shrunk": held(set(range(100)), shrink, len),
    "set_of_tuples": held(set(), lambda v, i, b: v.add((i, i % 3)), len),
    "namespaces": held([types.SimpleNamespace(worth=0) for _ in range(800)], priority, lambda v: v[-1].worth),
    "user_dict": held(UserDict(), lambda v, i, b: operator.setitem(v, i % 3, i), lambda v: sum(v.values())),
    "user_list": held(UserList([0]), lambda v, i, b: v.append(i), len),
    "chain_map": held(ChainMap({}, {"n": 1}), lambda v, i, b: operator.setitem(v, "n", v["n"] + 1), lambda v: v["n"]),
    "lambda_dict": held(defaultdict(lambda: [0]), in_lambda_dict, lambda v: sum(map(len, v.values()))),
    "vocabulary": made(vocabulary, read_words, lambda v: list(v.values())[-1]),
    "vocabulary_counted": made(lambda: defaultdict(itertools.count().__next__), read_words,
                               lambda v: list(v.values())[-1]),
    "fortran_array": held(np.zeros((16, 13), np.float32).T, fortran, lambda v: v.sum() * 10),
    "transposed_tensor": held(torch.zeros(16, 13).t(), transposed, lambda v: v.sum() * 10),
    "ring": held({"place": 0, "rows": [None] * 3}, ring, lambda v: v["rows"][v["place"]]["n"]),
    "distribution": held(torch.distributions.Normal(0.0, 1.0), distribution,
                         lambda v: v.log_prob(torch.ones(4)).sum()),
    "transitions": held(np.zeros(5, TRANSITIONS), field_array, lambda v: v["x"].sum() + v["i"].sum()),
    "nested_tensor": made(lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), lambda v, i, b: v * 0.9,
                          lambda v: v.values().sum() if v.layout is torch.jagged else v.unbind()[0].sum()),
    "quantized_tensor": made(lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
                             lambda v, i, b: torch.quantize_per_tensor(b[0].mean(0), 0.01, 0, torch.qint8),
                             lambda v: v.dequantize().sum()),
    "bfloat16_tensor": held(torch.zeros(4, dtype=torch.bfloat16), lambda v, i, b: v + 0.1, total),
    "memory_view": made(lambda: memoryview(bytearray(4)), lambda v, i, b: operator.setitem(v, i % 4, (v[i % 4] + 1) % 250),
                        lambda v: sum(v)),
    "complex": held(1j, lambda v, i, b: v * 1j, abs),
}  # fmt: skip


# -- aliases, keys ---------------------------------------------------------------------------------


class Episodes(Net):
    """The running one stands in the list of all, and is filled as it goes."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.kind = kind
        self.episodes: list[Any] = []
        self.running = kind()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % 4 == 0:
            self.running = self.kind()
            self.episodes.append(self.running)
        if isinstance(self.running, dict):
            self.running[batch_idx] = float(batch[1].mean())
        else:
            self.running.append(float(batch[1].mean()))
        return super().training_step(batch, batch_idx) * (1 + 0.01 * len(self.episodes[-1]))


class RunningFirst(Episodes):
    def __init__(self) -> None:
        super().__init__(list)
        del self.episodes
        self.episodes = []  # now behind `running`


class BestIsLast(Net):
    """The best is the last one, and that goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.record: dict[str, Any] = {"last": torch.zeros(4), "best": torch.zeros(4)}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 3:
            self.record["best"] = self.record["last"]
        if batch_idx == 6:
            self.record["last"] = self.record["last"].clone()
        self.record["last"].add_(batch[0].mean(0))
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.record["best"].sum())


class ByParameter(Net):
    """Of each weight something, with the weight itself as the key."""

    def __init__(self, key: Any) -> None:
        super().__init__()
        self.key = key
        self.moved = {key(p): torch.zeros_like(p) for p in self.net.parameters()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        size = sum(self.moved[self.key(p)].sum() for p in self.net.parameters())
        return super().training_step(batch, batch_idx) * (1 + 0.01 * size)

    def on_train_batch_end(self, *args: Any) -> None:
        for p in self.net.parameters():
            self.moved[self.key(p)].lerp_(p.detach(), 0.1)


class ByModule(Net):
    """Counts with modules as the keys, each made when it is first met."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[nn.Module, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        for part in self.net:
            self.calls[part] = self.calls.get(part, 0) + 1
            x = part(x)
        return x * (1 + 0.001 * self.calls[self.net[0]])


class WeakKeys(ByModule):
    def __init__(self) -> None:
        super().__init__()
        self.calls = weakref.WeakKeyDictionary()  # type: ignore[assignment]


class OnWeights(Net):
    """Attributes of the weights themselves, as code of binary networks has them."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        if not late:
            self.keep()

    def keep(self) -> None:
        for p in self.net.parameters():
            p.before = p.detach().clone()  # type: ignore[attr-defined]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not hasattr(self.net[0].weight, "before"):
            self.keep()
        away = sum((p - p.before).square().sum() for p in self.net.parameters())  # type: ignore[attr-defined]
        return super().training_step(batch, batch_idx) + 0.1 * away

    def on_train_batch_end(self, *args: Any) -> None:
        for p in self.net.parameters():
            p.before.lerp_(p.detach(), 0.2)  # type: ignore[attr-defined]


class OnBuffers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.mean.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean.count += 1
        return super().training_step(batch, batch_idx) / self.mean.count


class WeakTarget(Net):
    """A weak reference to the one of its parts that is used."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
        self.current = weakref.ref(self.scales[0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        scale = self.current()
        assert scale is not None
        if batch_idx % 4 == 3:
            self.current = weakref.ref(random.choice(list(self.scales)))
        return loss + scale(loss.view(1, 1)).square().mean()


class Swaps(Net):
    """Two registered parts exchange their roles; one optimizer trains whatever was the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + 0.1 * self.second(x).detach()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([*self.first.parameters(), *self.net.parameters()], lr=0.05)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step in (7, 16):
            self.first, self.second = self.second, self.first
        return self.loss(batch) + self.net(batch[0]).square().mean()


class SwapsBoth(Swaps):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


class ListSwaps(Net):
    """Networks in a plain list, turned round in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = [nn.Linear(4, 1), nn.Linear(4, 1)]

    def configure_optimizers(self) -> Any:
        rates = ((self.pair[0], 0.1), (self.pair[1], 0.01))
        groups = [{"params": [*net.parameters()], "lr": lr} for net, lr in rates]
        return torch.optim.Adam([*groups, {"params": [*self.net.parameters()], "lr": 0.05}])

    def on_train_epoch_end(self) -> None:
        self.pair.reverse()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        student, teacher = (net(batch[0]) for net in self.pair)
        mean = (student - batch[1]).square().mean() + (teacher - student.detach()).square().mean()
        return super().training_step(batch, batch_idx) + mean


class MadeLate(Net):
    """What the first batch makes."""

    def __init__(self, make: Any, use: Any) -> None:
        super().__init__()
        self.make, self.use, self.made = make, use, None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.made is None:
            self.made = self.make()
        return super().training_step(batch, batch_idx) * (1 + 0.1 * float(self.use(self.made)))


def use_lambda_dict(value: Any) -> int:
    value["n"][0] += 1
    return int(value["n"][0])


def in_items(value: Any) -> float:
    value.setdefault("rngs", []).append(np.random.default_rng(len(value)))
    return sum(float(rng.random()) for rng in value["rngs"])


class LosesKeys(Net):
    """A dict of values beside objects; a key goes, another comes."""

    def __init__(self) -> None:
        super().__init__()
        self.state: dict[str, Any] = {"rate": 1.0, "me": types.SimpleNamespace(n=0)}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4:
            del self.state["rate"]
        if self.global_step == 14:
            self.state["late"] = 0.5
        scale = 1 + self.state.get("rate", 0.0) + self.state.get("late", 0.0)
        return super().training_step(batch, batch_idx) * scale


SHAPES |= {
    "episode_in_list": Shape(model=lambda: Episodes(list), extra=own("episodes")),
    "episode_dict_in_list": Shape(model=lambda: Episodes(dict), extra=own("episodes")),
    "episode_before_list": Shape(model=RunningFirst, extra=own("episodes")),
    "best_is_last": Shape(model=BestIsLast),
    "by_parameter": Shape(model=lambda: ByParameter(lambda p: p)),
    "by_id": Shape(model=lambda: ByParameter(id)),
    "by_module": Shape(model=ByModule),
    "weak_keys": Shape(model=WeakKeys),
    "on_weights": Shape(model=lambda: OnWeights(False)),
    "on_weights_late": Shape(model=lambda: OnWeights(True)),
    "on_buffers": Shape(model=OnBuffers),
    "weak_target": Shape(model=WeakTarget),
    "swaps": Shape(model=Swaps),
    "swaps_both": Shape(model=SwapsBoth),
    "list_swaps": Shape(model=ListSwaps),
    "late_generator": Shape(model=lambda: MadeLate(lambda: np.random.default_rng(3), lambda v: v.random())),
    "late_random": Shape(model=lambda: MadeLate(lambda: random.Random(3), lambda v: v.random())),
    "late_torch_generator": Shape(model=lambda: MadeLate(
        lambda: torch.Generator().manual_seed(1), lambda v: torch.rand(1, generator=v))),
    "late_lambda_dict": Shape(model=lambda: MadeLate(lambda: defaultdict(lambda: [0]), use_lambda_dict)),
    "late_generators_in_a_dict": Shape(model=lambda: MadeLate(dict, in_items)),
    "late_record": Shape(model=lambda: MadeLate(lambda: Episode([1]), lambda v: v.append(1) or len(v))),
    "loses_keys": Shape(model=LosesKeys),
}  # fmt: skip


# -- descriptors, properties, slots -----------------------------------------------------------------


class Logarithm:
    """Keeps the logarithm under the very name."""

    def __set_name__(self, owner: Any, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else math.exp(vars(instance)[self.name])

    def __set__(self, instance: Any, value: float) -> None:
        vars(instance)[self.name] = math.log(value)


class PerInstance:
    """Keeps its values itself, as an old recipe does."""

    def __init__(self) -> None:
        self.values: Any = weakref.WeakKeyDictionary()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else self.values.get(instance, 1.0)

    def __set__(self, instance: Any, value: float) -> None:
        self.values[instance] = value


class Schedule:
    rate = Logarithm()

    def __init__(self) -> None:
        self.rate = 1.0


class Recipe:
    rate = PerInstance()


class SetterCounts:
    """A property whose setter does more than to set."""

    def __init__(self) -> None:
        self.sets, self._rate = 0, 1.0

    @property
    def rate(self) -> float:
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        self.sets += 1
        self._rate = value / self.sets


class Slotted:
    __slots__ = ("__weakref__", "rate")

    def __init__(self) -> None:
        self.rate = 1.0


@dataclass(slots=True)
class SlottedData:
    rate: float = 1.0
    seen: list[float] = field(default_factory=list)


class Decays(Net):
    def __init__(self, holder: Any) -> None:
        super().__init__()
        self.holder = holder

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.holder.rate = self.holder.rate * 0.9 + 0.01 * float(batch[1].mean())
        return super().training_step(batch, batch_idx) * self.holder.rate


class CachedProperty(Net):
    @functools.cached_property
    def offset(self) -> float:
        return float(torch.rand(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + self.offset)


SHAPES |= {
    "descriptor_transforms": Shape(model=lambda: Decays(Schedule())),
    "descriptor_keeps": Shape(model=lambda: Decays(Recipe())),
    "property_setter": Shape(model=lambda: Decays(SetterCounts())),
    "slots": Shape(model=lambda: Decays(Slotted())),
    "slots_dataclass": Shape(model=lambda: Decays(SlottedData())),
    "cached_property": Shape(model=CachedProperty),
}


# -- shared by all: globals, classes, closures, the process --------------------------------------------

SPACE = types.SimpleNamespace(count=0)
TABLE: dict[str, Any] = {"me": SPACE, "count": 0}
LAYER = nn.Linear(1, 1)
LOCAL = threading.local()
VARIABLE: contextvars.ContextVar[int] = contextvars.ContextVar("count", default=0)
COUNTER = ctypes.c_int(0)
NUMBER = 0
REGISTRY: list[Any] = [SPACE]
TORCH_RNG = torch.Generator()


class Bump:
    """Its method changes a global."""

    total: ClassVar[list[int]] = []

    def go(self) -> int:
        global NUMBER
        NUMBER += 1
        return NUMBER

    def note(self) -> int:
        self.total.append(1)
        return len(self.total)


class Derived(Bump): ...


BUMP = Bump()
PARTIAL = functools.partial(lambda rng: float(rng.normal()), np.random.default_rng(0))


def count_calls(function: Any) -> Any:
    """A decorator that counts."""
    calls = 0

    @functools.wraps(function)
    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return function(*args) * calls

    def reset() -> None:
        nonlocal calls
        calls = 0

    RESETS.append(reset)
    return counted


RESETS: list[Any] = []


@count_calls
def decorated(scale: float) -> float:
    return scale


class Decorated(Net):
    """Its own method is decorated."""

    @count_calls
    def share(self, scale: float) -> float:
        return scale

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * self.share(0.1)


class Memo:
    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args) * self.calls


@Memo
def memoized(scale: float) -> float:
    return scale


def by_space() -> float:
    SPACE.count += 1
    return SPACE.count


def by_table() -> float:
    TABLE["count"] += 1
    return float(TABLE["count"])


def by_layer() -> float:
    with torch.no_grad():
        LAYER.weight += 0.1
    return float(LAYER.weight.detach())


def by_local() -> float:
    LOCAL.count = getattr(LOCAL, "count", 0) + 1
    return float(LOCAL.count)


def by_variable() -> float:
    VARIABLE.set(VARIABLE.get() + 1)
    return float(VARIABLE.get())


def by_counter() -> float:
    COUNTER.value += 1
    return float(COUNTER.value)


def by_new_object() -> float:
    return float(Derived().go())


def by_class_of_object() -> float:
    return float(BUMP.note())


def by_import() -> float:
    from shapes import second

    second.NUMBER += 1
    return float(second.NUMBER)


def by_module_path() -> float:
    shapes.second.NUMBER += 1
    return float(shapes.second.NUMBER)


def by_registry() -> float:
    REGISTRY[0].count += 1
    return float(REGISTRY[0].count)


def by_partial() -> float:
    return PARTIAL()


def by_torch_rng() -> float:
    return float(torch.rand(1, generator=TORCH_RNG))


def by_environment() -> float:
    os.environ["SHAPES_COUNT"] = str(int(os.environ.get("SHAPES_COUNT", "0")) + 1)
    return float(os.environ["SHAPES_COUNT"])


def by_globals() -> float:
    globals()["NUMBER"] += 1
    return float(NUMBER)


def by_function_attribute() -> float:
    by_function_attribute.calls = getattr(by_function_attribute, "calls", 0) + 1  # type: ignore[attr-defined]
    return float(by_function_attribute.calls)  # type: ignore[attr-defined]


def forget() -> None:
    global NUMBER
    NUMBER = SPACE.count = TABLE["count"] = COUNTER.value = memoized.calls = 0
    LAYER.weight.data.fill_(1)
    vars(LOCAL).clear()
    VARIABLE.set(0)
    Bump.total.clear()
    PARTIAL.args[0].bit_generator.state = np.random.PCG64(0).state
    TORCH_RNG.manual_seed(0)
    os.environ.pop("SHAPES_COUNT", None)
    vars(by_function_attribute).clear()
    for reset in RESETS:
        reset()


class Scaled(Net):
    """Scales by what a function gives, which is called by its name."""

    def __init__(self, by: Any) -> None:
        super().__init__()
        self.by = by

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * (1 + 0.01 * self.by())


BY = {
    "space": by_space, "table": by_table, "layer": by_layer, "local": by_local, "variable": by_variable,
    "counter": by_counter, "new_object": by_new_object, "class_of_object": by_class_of_object, "import": by_import,
    "module_path": by_module_path, "registry": by_registry, "partial": by_partial, "torch_rng": by_torch_rng,
    "environment": by_environment, "globals": by_globals,
    "decorated": lambda: decorated(1.0), "memoized": lambda: memoized(1.0), "function_attribute": by_function_attribute,
}  # fmt: skip
SHAPES |= {
    f"by_{name}": Shape(model=lambda by=by: Scaled(by), reset=forget) for name, by in BY.items()
}
SHAPES |= {"decorated_method": Shape(model=Decorated, reset=forget)}


# -- attributes on what frameworks own --------------------------------------------------------------


class OnTrainer(Net):
    """Notes on the Trainer, a logger, the optimizer or the strategy."""

    def __init__(self, where: Any) -> None:
        super().__init__()
        self.where = where

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        holder = self.where(self)
        holder.notes = getattr(holder, "notes", 0) + 1
        return super().training_step(batch, batch_idx) / holder.notes


def schedule_of(model: Any) -> Any:
    return model.lr_schedulers()


class OnSchedule(OnTrainer):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class PatchedStep(Net):
    """The step of an optimizer of torch, called through a function that counts."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        step, calls = optimizer.step, 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            optimizer.param_groups[0]["lr"] = 0.05 / calls
            return step(*args, **kwargs)

        optimizer.step = counted
        return optimizer


SHAPES |= {
    "on_trainer": Shape(model=lambda: OnTrainer(lambda m: m.trainer)),
    "on_logger": Shape(model=lambda: OnTrainer(lambda m: m.logger)),
    "on_optimizer": Shape(model=lambda: OnTrainer(lambda m: m.optimizers().optimizer)),
    "on_lightning_optimizer": Shape(model=lambda: OnTrainer(lambda m: m.optimizers())),
    "on_schedule": Shape(model=lambda: OnSchedule(schedule_of)),
    "on_strategy": Shape(model=lambda: OnTrainer(lambda m: m.trainer.strategy)),
    "on_loop": Shape(model=lambda: OnTrainer(lambda m: m.trainer.fit_loop)),
    "patched_step": Shape(model=PatchedStep),
}

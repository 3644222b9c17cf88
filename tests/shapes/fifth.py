"""Trainings that keep what other libraries make: estimators, buffers of text, quasi-random numbers."""

import array
import collections
import csv
import ctypes
import decimal
import heapq
import io
import itertools
import multiprocessing
import queue
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.cluster import MiniBatchKMeans
from sklearn.linear_model import SGDRegressor
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.quasirandom import SobolEngine

from shapes.base import Shape
from shapes.fourth import Scaled


class Standard(Scaled):
    """Features scaled by an estimator of scikit-learn that goes on learning."""

    def __init__(self) -> None:
        super().__init__()
        self.scaler = StandardScaler()

    def number(self, batch: Any) -> Any:
        self.scaler.partial_fit(batch[0].numpy())
        return 1 + float(self.scaler.mean_.sum()) / 10


class Clusters(Scaled):
    """Pseudo labels of clusters, as deep clustering has them."""

    def __init__(self) -> None:
        super().__init__()
        self.clusters = MiniBatchKMeans(3, random_state=0, n_init=1, batch_size=8)

    def number(self, batch: Any) -> Any:
        self.clusters.partial_fit(batch[0].numpy())
        return 1 + float(self.clusters.cluster_centers_.sum()) / 20


class Regressor(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.head = SGDRegressor(random_state=0)

    def number(self, batch: Any) -> Any:
        self.head.partial_fit(batch[0].numpy(), batch[1].numpy().ravel())
        return 1 + float(self.head.coef_.sum()) / 20


class Sparse(Scaled):
    """A table of counts of scipy."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.counts = getattr(scipy.sparse, kind)((8, 8))

    def number(self, batch: Any) -> Any:
        i = self.global_step % 8
        if isinstance(self.counts, scipy.sparse.csr_matrix):
            add = scipy.sparse.csr_matrix(([1.0], ([i], [i])), shape=(8, 8))
            self.counts = self.counts + add
        else:
            self.counts[i, i] += 1
        return 1 + float(self.counts.sum()) / 20


class Sobol(Scaled):
    def __init__(self, scramble: bool) -> None:
        super().__init__()
        self.engine = SobolEngine(2, scramble=scramble, seed=3)

    def number(self, batch: Any) -> Any:
        return 1 + float(self.engine.draw(2).sum()) / 10


class ScipySobol(Scaled):
    def __init__(self) -> None:
        super().__init__()
        from scipy.stats import qmc

        self.engine = qmc.Halton(2, seed=3)

    def number(self, batch: Any) -> Any:
        return 1 + float(self.engine.random(2).sum()) / 10


class Text(Scaled):
    """A table in memory that rows are written to."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.text: Any = io.BytesIO() if kind == "bytes" else io.StringIO()

    def number(self, batch: Any) -> Any:
        if self.kind == "bytes":
            self.text.write(b"x" * (self.global_step % 3))
        else:
            csv.writer(self.text).writerow([self.global_step])
        return 1 + len(self.text.getvalue()) / 100


class Heap(Scaled):
    """The hardest losses, as a heap of tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.heap: list[tuple[float, int]] = []

    def number(self, batch: Any) -> Any:
        heapq.heappush(self.heap, (float(batch[0].sum()), self.global_step))
        if len(self.heap) > 4:
            heapq.heappop(self.heap)
        return 1 + sum(one for one, _ in self.heap) / 50


class Priority(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.queue: Any = queue.PriorityQueue()

    def number(self, batch: Any) -> Any:
        self.queue.put((float(batch[0].sum()), self.global_step))
        if self.queue.qsize() > 3:
            self.queue.get()
        return 1 + self.queue.queue[0][0] / 50


class Lru(Scaled):
    """A cache that goes by the order of its use."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Any = collections.OrderedDict()

    def number(self, batch: Any) -> Any:
        key = self.global_step * 7 % 5
        self.cache[key] = self.cache.get(key, 0) + 1
        self.cache.move_to_end(key)
        if len(self.cache) > 3:
            self.cache.popitem(last=False)
        return 1 + sum(i * k * v for i, (k, v) in enumerate(self.cache.items())) / 100


class Exact(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.total = decimal.Decimal(0)

    def number(self, batch: Any) -> Any:
        self.total += decimal.Decimal(str(round(float(batch[0].sum()), 3)))
        return 1 + float(self.total) / 100


class Shared(Scaled):
    """A number of other processes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "value":
            self.count: Any = multiprocessing.Value("d", 0.0)
        elif kind == "raw":
            self.count = multiprocessing.RawValue("d", 0.0)
        else:
            self.count = ctypes.c_double(0.0)

    def number(self, batch: Any) -> Any:
        self.count.value += 0.1
        return 1 + self.count.value


class SharedArray(Scaled):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.counts: Any = (
            multiprocessing.Array("d", 4) if kind == "shared" else array.array("d", [0.0] * 4)
        )

    def number(self, batch: Any) -> Any:
        self.counts[self.global_step % 4] += 0.1
        return 1 + sum(self.counts)


class Mapped(Scaled):
    """Numbers in a file that is mapped."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.table = np.memmap(Path(self.folder.name) / "t", np.float32, "w+", shape=(4,))

    def number(self, batch: Any) -> Any:
        self.table += 0.1
        return 1 + float(self.table.sum()) / 10


class Normal(Scaled):
    """A distribution whose mean a training moves."""

    def __init__(self) -> None:
        super().__init__()
        self.prior = torch.distributions.Normal(torch.zeros(4), torch.ones(4))

    def number(self, batch: Any) -> Any:
        self.prior.loc += 0.1 * batch[0].mean(0)
        return 1 - self.prior.log_prob(batch[0]).mean() / 20


class Counting(Scaled):
    """`itertools.count`, of which nobody sees how far it is."""

    def __init__(self) -> None:
        super().__init__()
        self.count = itertools.count()

    def number(self, batch: Any) -> Any:
        return 1 + next(self.count) / 10


class Rolled(Scaled):
    """A window that is turned round in place, and a view that stays."""

    def __init__(self) -> None:
        super().__init__()
        self.window = np.zeros((4, 4), np.float32)
        self.newest = self.window[-1]

    def number(self, batch: Any) -> Any:
        self.window[:] = np.roll(self.window, -1, axis=0)
        self.newest[:] = batch[0].mean(0).numpy()
        return 1 + float(self.window.sum()) / 20


class Generators(Scaled):
    """NumPy's older generator, its seeds, and one of a bit generator that is jumped."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.rng: Any = {
            "state": lambda: np.random.RandomState(1),
            "seeds": lambda: np.random.SeedSequence(1),
            "philox": lambda: np.random.Generator(np.random.Philox(1)),
            "bits": lambda: np.random.PCG64(1),
        }[kind]()

    def number(self, batch: Any) -> Any:
        if self.kind == "seeds":
            return 1 + np.random.default_rng(self.rng.spawn(1)[0]).random()
        if self.kind == "bits":
            return 1 + float(self.rng.random_raw() % 100) / 100
        return 1 + float(self.rng.normal()) / 10


class Swapped(Scaled):
    """A method that a training exchanges by itself, among those of the class."""

    def __init__(self) -> None:
        super().__init__()
        self.rule = self.low

    def low(self) -> float:
        return 0.5

    def high(self) -> float:
        return 1.5

    def number(self, batch: Any) -> Any:
        self.rule = self.high if self.global_step % 7 > 3 else self.low
        return self.rule()


class Late(Scaled):
    """A method that is exchanged once, and stays."""

    def __init__(self) -> None:
        super().__init__()
        self.rule = self.low

    low = Swapped.low
    high = Swapped.high

    def number(self, batch: Any) -> Any:
        if self.global_step == 5:
            self.rule = self.high
        return self.rule()


class Chosen(Scaled):
    """A layer that an attribute points to: another one later."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = torch.nn.ModuleList([torch.nn.Linear(4, 1) for _ in range(3)])
        self.active = [self.heads[0]]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.active[0] = self.heads[self.global_step // 3 % 3]
        return super().training_step(batch, batch_idx) + self.active[0](batch[0]).mean()

    def number(self, batch: Any) -> Any:
        return 1.0


class ChosenOnce(Chosen):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4:
            self.active = [self.heads[2]]
        return Scaled.training_step(self, batch, batch_idx) + self.active[0](batch[0]).mean()


class Masked(Scaled):
    """A tensor subclass, a bool mask, complex numbers, a quantised range."""

    def __init__(self) -> None:
        super().__init__()
        self.wave = torch.zeros(4, dtype=torch.complex64)
        self.mask = torch.zeros(4, dtype=torch.bool)
        self.half = torch.zeros(4, dtype=torch.bfloat16)

    def number(self, batch: Any) -> Any:
        self.wave += torch.complex(batch[0].mean(0), batch[0].std(0)) / 10
        self.mask ^= batch[0].mean(0) > 0
        self.half = self.half + batch[0].mean(0).bfloat16()
        total: Tensor = self.wave.abs().sum() + self.mask.sum() + self.half.float().sum()
        return 1 + float(total) / 20


SHAPES = {
    "standard_scaler": Shape(Standard),
    "clusters": Shape(Clusters),
    "regressor": Shape(Regressor),
    "sparse_lil": Shape(lambda: Sparse("lil_matrix")),
    "sparse_dok": Shape(lambda: Sparse("dok_matrix")),
    "sparse_csr": Shape(lambda: Sparse("csr_matrix")),
    "sobol": Shape(lambda: Sobol(False)),
    "sobol_scrambled": Shape(lambda: Sobol(True)),
    "halton": Shape(ScipySobol),
    "text_in_memory": Shape(lambda: Text("text")),
    "bytes_in_memory": Shape(lambda: Text("bytes")),
    "heap": Shape(Heap),
    "priority_queue": Shape(Priority),
    "lru": Shape(Lru),
    "decimal": Shape(Exact),
    "shared_value": Shape(lambda: Shared("value")),
    "raw_value": Shape(lambda: Shared("raw")),
    "c_double": Shape(lambda: Shared("c")),
    "shared_array": Shape(lambda: SharedArray("shared")),
    "plain_array": Shape(lambda: SharedArray("plain")),
    "memory_map": Shape(Mapped),
    "distribution": Shape(Normal),
    "counting": Shape(Counting),
    "rolled": Shape(Rolled),
    "random_state": Shape(lambda: Generators("state")),
    "seed_sequence": Shape(lambda: Generators("seeds")),
    "philox": Shape(lambda: Generators("philox")),
    "bit_generator": Shape(lambda: Generators("bits")),
    "swapped_method": Shape(Swapped),
    "late_method": Shape(Late),
    "chosen_layer": Shape(Chosen),
    "chosen_once": Shape(ChosenOnce),
    "kinds_of_tensors": Shape(Masked),
}

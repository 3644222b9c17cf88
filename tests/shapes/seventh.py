"""Trainings in the manner of public scripts: their data, their loops, and hooks in every place."""

import bisect
import functools
import itertools
import json
import logging
import math
import random
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, EarlyStopping, LearningRateMonitor
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    StackDataset,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    random_split,
)
from torchvision.transforms import v2

from savepoint import Batches
from shapes import base
from shapes.base import (
    BATCH,
    TRAIN,
    VAL,
    Data,
    Manual,
    Net,
    Samples,
    Shape,
    data,
    resumable,
    shuffled,
    tensors,
    validation,
)

INTERVAL = {"val_check_interval": 3}
WORKERS = {"num_workers": 2, "multiprocessing_context": "fork"}
mse = nn.functional.mse_loss


def loaded(dataset: Any, **arguments: Any) -> Any:
    """The factory of a data module with a shuffling loader of this data set."""
    return data(lambda: resumable(DataLoader(dataset(), BATCH, shuffle=True, **arguments)))


# -- data sets that open what they need when it is needed ------------------------------------------


@functools.cache
def folder() -> Path:
    path = Path(tempfile.mkdtemp(prefix="shapes-"))
    x, y = tensors()
    np.save(path / "x.npy", x.numpy())
    np.save(path / "y.npy", y.numpy())
    with sqlite3.connect(path / "rows.db") as rows:
        rows.execute("create table rows (x text, y real)")
        for one, goal in zip(x.tolist(), y.flatten().tolist(), strict=True):
            rows.execute("insert into rows values (?, ?)", (json.dumps(one), goal))
    rows.close()
    lines = [json.dumps([one, goal]) for one, goal in zip(x.tolist(), y.tolist(), strict=True)]
    (path / "lines.jsonl").write_text("\n".join(lines) + "\n")
    return path


class OpensArrays(Samples):
    """As HDF5 is read: opened in the worker, at the first sample."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.file = folder(), None

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            self.file = np.load(self.path / "x.npy", mmap_mode="r")
            self.goals = np.load(self.path / "y.npy", mmap_mode="r")
        return torch.from_numpy(self.file[index].copy()), torch.tensor(self.goals[index])


class OpensDatabase(Samples):
    def __init__(self) -> None:
        super().__init__()
        self.connection: Any = None

    def __getitem__(self, index: int) -> Any:
        if self.connection is None:
            self.connection = sqlite3.connect(folder() / "rows.db")
        query = "select x, y from rows where rowid = ?"
        x, y = self.connection.execute(query, (index + 1,)).fetchone()
        return torch.tensor(json.loads(x)), torch.tensor([y])


class OpensLines(Samples):
    """Lines by their offsets, in a file that stays open."""

    def __init__(self) -> None:
        super().__init__()
        self.file: Any = None
        self.offsets = [0]
        with (folder() / "lines.jsonl").open("rb") as file:
            self.offsets += list(itertools.accumulate(len(line) for line in file))[:-1]

    def __getitem__(self, index: int) -> Any:
        if self.file is None:
            self.file = (folder() / "lines.jsonl").open("rb")
        self.file.seek(self.offsets[index])
        x, y = json.loads(self.file.readline())
        return torch.tensor(x), torch.tensor(y)


class OpensHere(OpensLines):
    def __init__(self) -> None:
        super().__init__()
        self.file = (folder() / "lines.jsonl").open("rb")


class Locked(Samples):
    """With a lock, a logger and a cache of what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.lock, self.log = threading.Lock(), logging.getLogger("shapes")
        self.cache: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        with self.lock:
            if index not in self.cache:
                self.log.debug("reads %d", index)
                self.cache[index] = super().__getitem__(index)
        return self.cache[index]


class Triplets(Samples):
    """Negatives by random.choice, from lists by class that __init__ draws."""

    def __init__(self) -> None:
        super().__init__()
        self.by_class = {0: [], 1: []}
        for i, y in enumerate(self.y.flatten().tolist()):
            self.by_class[int(y > 2)].append(i)
        for one in self.by_class.values():
            random.shuffle(one)

    def __getitem__(self, index: int) -> Any:
        other = random.choice(self.by_class[int(self.y[index] <= 2)])
        return self.x[index] - 0.1 * self.x[other], self.y[index]


class Mosaic(Samples):
    """Mixed with others of the set, at a rate that the epoch sets."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.mixed = 0.8, 0

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        if random.random() < self.p:
            share = np.random.beta(0.5, 0.5)
            other = np.random.randint(len(self))
            x, y = share * x + (1 - share) * self.x[other], share * y + (1 - share) * self.y[other]
        return x.float(), y.float()


class ClosesMosaic(Net):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 2:
            loader = self.trainer.train_dataloader
            getattr(loader, "loader", loader).dataset.p = 0.0


class Harder(Net):
    """Samples that lost much are drawn more often."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        errors = (self(x) - y).square().flatten()
        weights = self.trainer.datamodule.weights
        weights[index] = 0.5 * weights[index] + 0.5 * errors.detach().double() + 1e-3
        return errors.mean()


class Indexed(Samples):
    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index], index


class HarderData(Data):
    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.ones(TRAIN, dtype=torch.double)

    def train_dataloader(self) -> Any:
        sampler = WeightedRandomSampler(self.weights, TRAIN)
        return resumable(DataLoader(Indexed(), BATCH, sampler=sampler))


class ActiveData(LightningDataModule):
    """A pool of samples that have labels, which grows with each epoch."""

    def __init__(self, by_model: bool) -> None:
        super().__init__()
        self.by_model, self.dataset = by_model, TensorDataset(*tensors())
        order = np.random.permutation(TRAIN).tolist()
        self.labelled, self.pool = order[:20], order[20:]

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(Subset(self.dataset, self.labelled), BATCH, shuffle=True))

    def val_dataloader(self) -> Any:
        return validation()

    def query(self, model: Any) -> None:
        if self.by_model:
            with torch.no_grad():
                scores = model(self.dataset.tensors[0][self.pool]).flatten()
            places = scores.argsort()[:4].tolist()
        else:
            places = random.sample(range(len(self.pool)), 4)
        chosen = [self.pool[place] for place in places]
        self.labelled += chosen
        self.pool = [one for one in self.pool if one not in chosen]


class Active(Net):
    def on_train_epoch_end(self) -> None:
        self.trainer.datamodule.query(self)
        self.log("labelled", float(len(self.trainer.datamodule.labelled)))


class Folds(LightningDataModule):
    """Another fold each time that the loaders are made."""

    def __init__(self) -> None:
        super().__init__()
        self.fold = -1

    def setup(self, stage: str) -> None:
        self.order = torch.randperm(TRAIN).tolist()
        self.dataset = TensorDataset(*tensors())

    def train_dataloader(self) -> Any:
        self.fold += 1
        chosen = [one for i, one in enumerate(self.order) if i % 4 != self.fold % 4]
        return resumable(DataLoader(Subset(self.dataset, chosen), BATCH, shuffle=True))

    def val_dataloader(self) -> Any:
        chosen = [one for i, one in enumerate(self.order) if i % 4 == self.fold % 4]
        return DataLoader(Subset(self.dataset, chosen), BATCH)


class GrowingBatches(Data):
    def train_dataloader(self) -> Any:
        size = 2 ** (1 + self.trainer.current_epoch)
        return resumable(DataLoader(TensorDataset(*tensors()), size, shuffle=True))


class RandomSizes(Data):
    """Loaders of each epoch drawn when they are made."""

    def train_dataloader(self) -> Any:
        size = random.choice([2, 4, 5])
        part = torch.randperm(TRAIN)[:20].tolist()
        return resumable(DataLoader(Subset(TensorDataset(*tensors()), part), size, shuffle=True))


class DrawnValidation(Data):
    """The validation set drawn when its loader is made: in mid-training, that is."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.made = where, 0

    def train_dataloader(self) -> Any:
        self.made += 1
        if self.where == "both":
            part = random.sample(range(TRAIN), 24 + 4 * self.made)
            return resumable(DataLoader(Subset(Samples(), part), BATCH, shuffle=True))
        return shuffled()

    def val_dataloader(self) -> Any:
        rest = torch.randperm(VAL)[: 4 + 4 * (self.made % 3)].tolist()
        return DataLoader(Subset(Samples(VAL, 1), rest), BATCH)


class MakesItself(Net):
    """Loaders that the module makes of what it has learned."""

    def __init__(self) -> None:
        super().__init__()
        self.hard = list(range(0, TRAIN, 2))

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(Subset(Samples(), self.hard), BATCH, shuffle=True))

    def val_dataloader(self) -> Any:
        return DataLoader(Subset(Samples(), [i % TRAIN for i in self.hard[:8]]), BATCH)

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            x, y = tensors()
            errors = (self(x) - y).square().flatten()
        self.hard = errors.argsort(descending=True)[:24].tolist()


class Appended(Data):
    """A data set that becomes longer in the middle of an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = [(torch.full((4,), i / 20), torch.tensor([i / 10])) for i in range(24)]

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(self.samples, BATCH, shuffle=True))


class Appends(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % 2:
            self.trainer.datamodule.samples.append((batch[0][0] * 0.9, batch[1][0]))
        return super().training_step(batch, batch_idx)


RELOAD = {"reload_dataloaders_every_n_epochs": 1}


# -- samplers ---------------------------------------------------------------------------------------


class Buckets(Sampler[list[int]]):
    """Batches of like lengths, in an order of its own for each epoch."""

    def __init__(self, lengths: list[int], size: int) -> None:
        self.size, self.epoch = size, 0
        bounds = [5, 10]
        self.buckets: list[list[int]] = [[] for _ in range(3)]
        for i, length in enumerate(lengths):
            self.buckets[bisect.bisect(bounds, length)].append(i)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(self.epoch)
        batches = []
        for bucket in self.buckets:
            rng.shuffle(bucket)  # the bucket itself: it goes on from epoch to epoch
            batches += [bucket[i : i + self.size] for i in range(0, len(bucket), self.size)]
        rng.shuffle(batches)
        return iter(batches)

    def __len__(self) -> int:
        return sum(math.ceil(len(bucket) / self.size) for bucket in self.buckets)


class InPlace(Sampler[int]):
    """Shuffles one list again and again."""

    def __init__(self, count: int) -> None:
        self.order = list(range(count))

    def __iter__(self) -> Iterator[int]:
        random.shuffle(self.order)
        return iter(self.order)

    def __len__(self) -> int:
        return len(self.order)


class Endless(Sampler[int]):
    """As detectron has it: never at its end, with a generator of its own."""

    def __init__(self, count: int) -> None:
        self.count, self.seed = count, 7

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(self.count, generator=generator).tolist()


class EpisodeSampler(Sampler[list[int]]):
    """Few shots: classes and samples drawn by NumPy, for so many episodes."""

    def __init__(self, labels: np.ndarray, episodes: int) -> None:
        self.labels, self.episodes = labels, episodes
        self.rng = np.random.RandomState(3)

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.episodes):
            chosen = self.rng.choice(2, 2, replace=False)
            yield np.concatenate(
                [self.rng.choice(np.flatnonzero(self.labels == c), 2) for c in chosen]
            ).tolist()

    def __len__(self) -> int:
        return self.episodes


class Balanced(Sampler[int]):
    """Two populations in turn; each goes on where it was."""

    def __init__(self) -> None:
        self.streams = [itertools.cycle(range(0, TRAIN, 2)), itertools.cycle(range(1, TRAIN, 2))]

    def __iter__(self) -> Iterator[int]:
        for _ in range(TRAIN // 2):
            for stream in self.streams:
                yield next(stream)

    def __len__(self) -> int:
        return TRAIN


def sampled(make: Any) -> Any:
    return data(lambda: resumable(DataLoader(Samples(), BATCH, sampler=make())))


def batched(make: Any) -> Any:
    return data(lambda: resumable(DataLoader(Samples(), batch_sampler=make())))


def labels() -> np.ndarray:
    return (tensors()[1].flatten() > 2).numpy().astype(int)


# -- collate functions, transforms, streams ---------------------------------------------------------


def mixed(batch: Any) -> Any:
    """As the page of torchvision's transforms writes it."""
    x, y = default_collate(batch)
    place = torch.randperm(len(x))
    share = np.random.beta(0.4, 0.4)
    x, y = share * x + (1 - share) * x[place], share * y + (1 - share) * y[place]
    return x.float(), y.float()


class Padding:
    """Crops each batch to the longest that it has seen so far."""

    def __init__(self) -> None:
        self.longest, self.batches = 0, 0

    def __call__(self, batch: Any) -> Any:
        x, y = default_collate(batch)
        self.batches += 1
        self.longest = max(self.longest, int(10 * x.sum(1).max()))
        return x * (1 + self.longest / 100) / self.batches, y


def padded() -> Any:
    return resumable(DataLoader(Samples(), BATCH, shuffle=True, collate_fn=Padding()))


class Images(Samples):
    def __init__(self) -> None:
        super().__init__()
        self.transform = v2.Compose(
            [v2.RandomHorizontalFlip(), v2.RandomErasing(p=0.5), v2.GaussianNoise(sigma=0.1)]
        )

    def __getitem__(self, index: int) -> Any:
        x, y = super().__getitem__(index)
        return self.transform(x.view(1, 2, 2).clamp(0, 1)).flatten(), y


class Lines(IterableDataset[Any]):
    """Lines of a file, shuffled in a buffer."""

    def __init__(self) -> None:
        self.seen = 0

    def __iter__(self) -> Iterator[Any]:
        buffer: list[Any] = []
        with (folder() / "lines.jsonl").open() as file:
            for line in file:
                self.seen += 1
                x, y = json.loads(line)
                buffer.append((torch.tensor(x), torch.tensor(y)))
                if len(buffer) == 8:
                    yield buffer.pop(random.randrange(8))
        random.shuffle(buffer)
        yield from buffer

    def __len__(self) -> int:
        return TRAIN


class Chunks(IterableDataset[Any]):
    """Chunks shared out among workers, in an order by the epoch that a loop sets."""

    def __init__(self) -> None:
        self.epoch = 0
        self.x, self.y = tensors()

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        number, count = (info.id, info.num_workers) if info else (0, 1)
        order = np.random.default_rng(self.epoch).permutation(TRAIN)
        for i in order[number::count]:
            yield self.x[i], self.y[i]


class SetsEpoch(Callback):
    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        trainer.train_dataloader.dataset.set_epoch(trainer.current_epoch)


def seeds_worker(number: int) -> None:
    """As the page of PyTorch on reproducibility has it."""
    seed = torch.initial_seed() % 2**32
    np.random.seed(seed)
    random.seed(seed)


def reproducible() -> Any:
    generator = torch.Generator()
    generator.manual_seed(0)
    arguments = {"worker_init_fn": seeds_worker, "generator": generator, **WORKERS}
    return resumable(DataLoader(Mosaic(), BATCH, shuffle=True, **arguments))


class Stacked(Net):
    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            batch = batch["x"], batch["y"]
        return super().loss(batch)


def stacked() -> Any:
    x, y = tensors()
    dataset = StackDataset(x=TensorDataset(x), y=TensorDataset(y))
    return resumable(
        DataLoader(dataset, BATCH, shuffle=True, collate_fn=lambda rows: {
            k: torch.stack([row[k][0] for row in rows]) for k in ("x", "y")
        })
    )  # fmt: skip


def joined() -> Any:
    one, other = Mosaic(), Images()
    part, _ = random_split(ConcatDataset([one, other]), [TRAIN, TRAIN])
    return resumable(DataLoader(part, BATCH, shuffle=True))


class Two(Net):
    """Labelled and unlabelled batches, in whatever form they come."""

    def loss(self, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            batch = [*batch.values()]
        parts = [one for one in batch if one is not None]
        if not isinstance(parts[0], Tensor):
            return sum(Two.loss(self, one) for one in parts)
        return super().loss(batch)


def short() -> Any:
    return resumable(DataLoader(TensorDataset(*tensors(24, 5)), BATCH, shuffle=True))


def nested(mode: str) -> Any:
    return data(lambda: CombinedLoader({"a": shuffled(), "b": [short(), shuffled()]}, mode))


# -- loaders that others read -----------------------------------------------------------------------


class RecalibratesNorm(Net):
    """Batch statistics taken anew from the training data, at the epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))

    def on_train_epoch_end(self) -> None:
        swa_utils.update_bn(self.trainer.train_dataloader, self.net)


class FeatureBank(Net):
    """Nearest neighbours among the training data, gathered in each validation."""

    def on_validation_epoch_start(self) -> None:
        rows = [batch for batch in self.trainer.train_dataloader]  # noqa: C416
        self.bank = torch.cat([self(x) for x, _ in rows]).detach()
        self.order = torch.cat([y for _, y in rows])

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        near = torch.cdist(self(batch[0]), self.bank).argmin(1)
        self.log("val/loss", mse(self.order[near], batch[1]))
        self.log("val/first", self.order[0].mean())


class Statistics(Net):
    """The mean of the data, from a pass before the training."""

    def on_fit_start(self) -> None:
        rows = [x for x, _ in self.trainer.datamodule.train_dataloader()]
        self.mean = torch.cat(rows).mean(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x - self.mean)


class Bilevel(Net):
    """A batch of the validation data with each step, by an iterator that begins anew."""

    def __init__(self) -> None:
        super().__init__()
        self.other: Any = None

    def fetch(self) -> Any:
        if self.other is None:
            self.loader = self.trainer.datamodule.val_dataloader()
            self.other = iter(self.loader)
        try:
            return next(self.other)
        except StopIteration:
            self.other = iter(self.loader)
            return next(self.other)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + 0.1 * self.loss(self.fetch())


class FreshBatch(Net):
    """A new iterator for each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = next(iter(self.trainer.datamodule.val_dataloader()))
        return super().training_step(batch, batch_idx) + 0.1 * self.loss((x, y))


class Peeks(Net):
    """The first batches of the training data, looked at from a hook: and no more."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.seen: Any = None
        setattr(self, hook, self.peek)

    def peek(self, *args: Any) -> None:
        x, _y = next(iter(self.trainer.train_dataloader))
        seen = float(x.sum())
        self.seen = seen if self.seen is None else 0.5 * self.seen + 0.5 * seen

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scale = 1.0 if self.seen is None else 1 + self.seen / 20
        return super().training_step(batch, batch_idx) * scale


class Breaks(Peeks):
    """Three batches, with the way through them kept until the next call."""

    def peek(self, *args: Any) -> None:
        total = 0.0
        for i, (x, _) in enumerate(self.trainer.train_dataloader):
            total += float(x.sum())
            if i == 2:
                break
        self.seen = total / 3


def whole_batches() -> Any:
    x, y = tensors()
    return Batches(x, y, batch_size=BATCH, seed=3) if base.WRAPPED else shuffled()


class Exchanges(Net):
    """The indices of a sampler change in the middle of an epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        indices = self.trainer.datamodule.indices
        if batch_idx % 3 == 2:
            indices[batch_idx] = indices[0]
        return super().training_step(batch, batch_idx)


class Indices(Data):
    def __init__(self) -> None:
        super().__init__()
        self.indices = list(range(TRAIN))

    def train_dataloader(self) -> Any:
        sampler = SubsetRandomSampler(self.indices)
        return resumable(DataLoader(Samples(), BATCH, sampler=sampler))


class Replacing(Appended):
    """Drawn with replacement, of a set that becomes longer."""

    def train_dataloader(self) -> Any:
        sampler = RandomSampler(self.samples, replacement=True)
        return resumable(DataLoader(self.samples, BATCH, sampler=sampler))


class SetsSize(Callback):
    """A batch size that a callback doubles on the data module, which makes its loaders anew."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.datamodule.batch_size = min(16, 2 * trainer.datamodule.batch_size)


class Sized(Data):
    batch_size = 2

    def train_dataloader(self) -> Any:
        dataset = TensorDataset(*tensors())
        return resumable(DataLoader(dataset, self.batch_size, shuffle=True))


def noisy_validation() -> Any:
    return DataLoader(Mosaic(), BATCH, shuffle=True)


# -- hooks ------------------------------------------------------------------------------------------


HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end",
    "on_train_epoch_end", "on_validation_start", "on_validation_epoch_start",
    "on_validation_batch_start", "on_validation_batch_end", "on_validation_epoch_end",
    "on_validation_end", "on_before_backward", "on_after_backward", "on_before_optimizer_step",
    "on_before_zero_grad", "on_validation_model_eval", "on_validation_model_train",
    "on_validation_model_zero_grad", "on_fit_start",
)  # fmt: skip


class Draws(Net):
    """Counts and draws in every hook of a module, and trains by it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.sum = 0.0

    def called(self, name: str) -> None:
        self.calls.append(name)
        self.sum += float(torch.rand(())) + random.random() + np.random.rand()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("sum", self.sum)
        self.log("calls", float(len(self.calls)))
        return super().training_step(batch, batch_idx) * (1 + self.sum % 1)


def _hook(name: str) -> Any:
    original = getattr(Net, name)

    @functools.wraps(original)
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.called(name)
        return original(self, *args, **kwargs)

    return hook


for _name in HOOKS:
    setattr(Draws, _name, _hook(_name))


class DrawsData(Data):
    """Augments on the device, in the hooks of a data module."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.moved = np.random.default_rng(2), 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.moved += 1
        return [batch[0] + 0.1 * torch.randn(()), batch[1]]

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        scale = float(self.generator.uniform(0.9, 1.1)) * (1 + self.moved / 1000)
        return [batch[0] * scale, batch[1]]


class DrawsCallback(Callback):
    """Every hook of a callback."""

    def __init__(self) -> None:
        self.rng, self.total, self.calls = random.Random(3), 0.0, 0

    def called(self, module: Any) -> None:
        self.calls += 1
        self.total += self.rng.random() + float(torch.rand(()))
        module.scale = 1 + self.total % 1


def _callback_hook(self: Any, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
    self.called(module)


for _name in HOOKS:
    if hasattr(Callback, _name):
        setattr(DrawsCallback, _name, _callback_hook)


class ScaledByCallback(Net):
    scale = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("scale", self.scale)
        return super().training_step(batch, batch_idx) * self.scale


class LeavesEarly(Net):
    """-1 from a hook of a batch, by a count of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        self.batches += 1
        return -1 if self.batches % 7 == 0 else None


class StopsOnPlateau(Callback):
    """`trainer.should_stop` by a list of losses of its own."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["val/loss"]))
        if len(self.losses) > 6 and min(self.losses[-2:]) > 0.5 * min(self.losses):
            trainer.should_stop = True


class Overrides(Net):
    """backward, optimizer_zero_grad, lr_scheduler_step and optimizer_step, all of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.scale = 0, 8.0

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (loss * self.scale).backward()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        self.steps += 1
        optimizer.step(closure=optimizer_closure)
        self.scale = 8.0 if self.steps % 5 else self.scale / 2

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            p.grad /= self.scale

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        if self.steps % 2:
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 2}]


class Unfreezes(Net):
    """Gives a layer to the optimizer when its epoch comes, with a rate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.net[2].parameters(), lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.net[0].requires_grad_(True)
            self.optimizers().add_param_group({"params": self.net[0].parameters(), "lr": 0.001})


class Profiled(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with self.trainer.profiler.profile("step"):
            return super().training_step(batch, batch_idx)


class ResetsOptimizer(Net):
    """A new optimizer for each epoch, by the strategy."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch:
            self.trainer.strategy.setup_optimizers(self.trainer)


class ClearsState(Net):
    """Momentum thrown away at each epoch."""

    def on_train_epoch_start(self) -> None:
        self.optimizers().optimizer.state.clear()


class ReadsTrainer(Net):
    """What the Trainer knows, in the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        t = self.trainer
        numbers = [
            t.global_step, t.current_epoch, batch_idx, t.num_training_batches,
            t.fit_loop.epoch_loop.batch_idx, t.fit_loop.total_batch_idx,
            t.fit_loop.epoch_loop._batches_that_stepped, int(t.is_last_batch),
            float(t.callback_metrics.get("val/loss", 1.0)),
            float(t.logged_metrics.get("train/loss_step", 1.0)),
            float(t.progress_bar_metrics.get("bar", 1.0)), len(t.callback_metrics),
            t.fit_loop.epoch_loop.val_loop.batch_progress.total.ready,
            t.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer_steps,
        ]  # fmt: skip
        loss = super().training_step(batch, batch_idx)
        self.log("bar", loss, prog_bar=True, logger=False)
        return loss * (1 + sum((i + 1) * float(n) for i, n in enumerate(numbers)) % 1.7)


class ManualPlateau(Manual):
    """Two schedules by hand: one by the batch, one by what a validation has shown."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        cycle = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=4)
        return [optimizer], [
            {"scheduler": plateau, "monitor": "val/loss"},
            {"scheduler": cycle, "interval": "step"},
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.lr_schedulers()[1].step()
        return loss

    def on_validation_epoch_end(self) -> None:
        self.lr_schedulers()[0].step(self.trainer.callback_metrics["val/loss"])


class GradientCache(Manual):
    """Accumulates by hand, with a rest at each epoch's end; clips with Lightning's own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        with optimizer.toggle_model(sync_grad=batch_idx % 3 == 2):
            self.manual_backward(self.loss(batch) / 3)
        if (batch_idx + 1) % 3 == 0 or self.trainer.is_last_batch:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            optimizer.zero_grad()
        self.log("norm", sum(p.abs().sum() for p in self.parameters()).detach())


def csv_too() -> list[Any]:
    return []


class Duration(Callback):
    """How long an epoch took, logged; the stamps are its own."""

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        seconds = time.perf_counter() - self.start
        trainer.logger.log_metrics({"clock/epoch": seconds}, step=trainer.global_step)


SHAPES = {
    "opens_arrays": Shape(data=loaded(OpensArrays)),
    "opens_arrays_workers": Shape(data=loaded(OpensArrays, **WORKERS), slow=True),
    "opens_database": Shape(data=loaded(OpensDatabase)),
    "opens_lines": Shape(data=loaded(OpensLines)),
    "opens_lines_workers": Shape(data=loaded(OpensLines, **WORKERS), slow=True),
    "opens_here": Shape(data=loaded(OpensHere)),
    "locked": Shape(data=loaded(Locked)),
    "triplets": Shape(data=loaded(Triplets)),
    "mosaic": Shape(ClosesMosaic, data=loaded(Mosaic)),
    "mosaic_workers": Shape(ClosesMosaic, data=loaded(Mosaic, **WORKERS), slow=True),
    "mosaic_persistent_interval": Shape(
        ClosesMosaic,
        data=loaded(Mosaic, persistent_workers=True, **WORKERS),
        trainer=INTERVAL,
        slow=True,
    ),
    "mosaic_persistent": Shape(
        ClosesMosaic, data=loaded(Mosaic, persistent_workers=True, **WORKERS), slow=True
    ),
    "hard_samples": Shape(Harder, data=HarderData),
    "hard_samples_reloaded": Shape(
        Harder, data=HarderData, trainer={"reload_dataloaders_every_n_epochs": 1}
    ),
    "active_model": Shape(
        Active, data=lambda: ActiveData(True), trainer={"reload_dataloaders_every_n_epochs": 1}
    ),
    "active_random": Shape(
        Active, data=lambda: ActiveData(False), trainer={"reload_dataloaders_every_n_epochs": 1}
    ),
    "active_interval": Shape(
        Active,
        data=lambda: ActiveData(True),
        trainer={"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 0.5},
    ),
    "folds": Shape(data=Folds, trainer={"reload_dataloaders_every_n_epochs": 1}),
    "folds_every_2": Shape(
        data=Folds, trainer={"reload_dataloaders_every_n_epochs": 2, "max_epochs": 4}
    ),
    "growing_batches": Shape(data=GrowingBatches, trainer={"reload_dataloaders_every_n_epochs": 1}),
    "random_sizes": Shape(data=RandomSizes, trainer={"reload_dataloaders_every_n_epochs": 1}),
    **{
        f"drawn_validation_{where}{name}": Shape(data=lambda w=where: DrawnValidation(w), trainer=t)
        for where in ("val", "both")
        for name, t in {
            "": {},
            "_reload": RELOAD,
            "_interval": INTERVAL,
            "_sanity": {"num_sanity_val_steps": 1},
            "_reload_2": {**RELOAD, "reload_dataloaders_every_n_epochs": 2, "max_epochs": 4},
            "_reload_sanity": {**RELOAD, **INTERVAL, "num_sanity_val_steps": 1},
        }.items()
    },
    "makes_itself": Shape(MakesItself, data=dict, trainer=RELOAD),
    "makes_itself_once": Shape(MakesItself, data=dict),
    "appended": Shape(Appends, data=Appended),
    "appended_interval": Shape(Appends, data=Appended, trainer=INTERVAL),
    "buckets": Shape(data=batched(lambda: Buckets([i % 14 for i in range(TRAIN)], 4))),
    "shuffles_in_place": Shape(data=sampled(lambda: InPlace(TRAIN))),
    "endless_sampler": Shape(
        data=sampled(lambda: Endless(TRAIN)), trainer={"limit_train_batches": 10}
    ),
    "endless_sampler_interval": Shape(
        data=sampled(lambda: Endless(TRAIN)),
        trainer={"limit_train_batches": 8, "val_check_interval": 4},
    ),
    "episodes": Shape(data=batched(lambda: EpisodeSampler(labels(), 10))),
    "balanced_streams": Shape(data=sampled(Balanced)),
    "drops_last": Shape(
        data=batched(lambda: BatchSampler(RandomSampler(range(TRAIN)), 7, drop_last=True))
    ),
    "mixed": Shape(data=loaded(Samples, collate_fn=mixed)),
    "mixed_workers": Shape(data=loaded(Samples, collate_fn=mixed, **WORKERS), slow=True),
    "padding": Shape(data=data(padded)),
    "images_v2": Shape(data=loaded(Images)),
    "lines_shuffled": Shape(data=data(lambda: DataLoader(Lines(), BATCH))),
    "chunks": Shape(
        data=data(lambda: DataLoader(Chunks(), BATCH)), callbacks=lambda: [SetsEpoch()]
    ),
    "chunks_workers": Shape(
        data=data(lambda: DataLoader(Chunks(), BATCH, **WORKERS)),
        callbacks=lambda: [SetsEpoch()],
        slow=True,
    ),
    "worker_init": Shape(data=data(reproducible), slow=True),
    "stacked": Shape(Stacked, data=data(stacked)),
    "joined": Shape(data=data(joined)),
    "nested_max": Shape(Two, data=nested("max_size")),
    "nested_min": Shape(Two, data=nested("min_size")),
    "nested_max_cycle": Shape(Two, data=nested("max_size_cycle")),
    "nested_max_interval": Shape(Two, data=nested("max_size"), trainer=INTERVAL),
    "recalibrates": Shape(RecalibratesNorm),
    "recalibrates_interval": Shape(RecalibratesNorm, trainer=INTERVAL),
    "feature_bank": Shape(FeatureBank),
    "feature_bank_interval": Shape(FeatureBank, trainer=INTERVAL),
    **{
        f"peeks_{hook}{name}": Shape(lambda h=hook: Peeks(h), trainer=t)
        for hook in (
            "on_train_start",
            "on_train_epoch_start",
            "on_train_batch_start",
            "on_train_epoch_end",
            "on_validation_start",
            "on_validation_end",
            "on_before_optimizer_step",
        )
        for name, t in {"": {}, "_interval": INTERVAL}.items()
    },
    "breaks": Shape(lambda: Breaks("on_validation_end"), trainer=INTERVAL),
    "peeks_batches": Shape(
        lambda: Peeks("on_validation_end"), data=data(whole_batches), trainer=INTERVAL
    ),
    "peeks_workers": Shape(
        lambda: Peeks("on_validation_end"),
        data=loaded(Mosaic, **WORKERS),
        trainer=INTERVAL,
        slow=True,
    ),
    "peeks_weighted": Shape(
        lambda: Peeks("on_validation_end"),
        data=sampled(lambda: WeightedRandomSampler(torch.arange(1.0, 41.0), TRAIN)),
        trainer=INTERVAL,
    ),
    "peeks_limited": Shape(
        lambda: Peeks("on_validation_end"), trainer={"limit_train_batches": 7, **INTERVAL}
    ),
    "peeks_endless": Shape(
        lambda: Peeks("on_validation_end"),
        data=sampled(lambda: Endless(TRAIN)),
        trainer={"limit_train_batches": 9, **INTERVAL},
    ),
    "exchanges": Shape(Exchanges, data=Indices),
    "replaces": Shape(Appends, data=Replacing),
    "sets_size": Shape(data=Sized, callbacks=lambda: [SetsSize()], trainer=RELOAD),
    "sets_size_interval": Shape(
        data=Sized, callbacks=lambda: [SetsSize()], trainer={**RELOAD, "val_check_interval": 0.5}
    ),
    "statistics": Shape(Statistics),
    "bilevel": Shape(Bilevel),
    "fresh_batch": Shape(FreshBatch, data=data(val=noisy_validation)),
    "fresh_batch_interval": Shape(FreshBatch, data=data(val=noisy_validation), trainer=INTERVAL),
    "draws_everywhere": Shape(Draws),
    "draws_everywhere_interval": Shape(Draws, trainer=INTERVAL),
    "draws_everywhere_accumulate": Shape(Draws, trainer={"accumulate_grad_batches": 3, **INTERVAL}),
    "draws_everywhere_sanity": Shape(Draws, trainer={"num_sanity_val_steps": 2}),
    "draws_in_transfer": Shape(data=DrawsData),
    "draws_in_transfer_interval": Shape(data=DrawsData, trainer=INTERVAL),
    "draws_in_callback": Shape(ScaledByCallback, callbacks=lambda: [DrawsCallback()]),
    "draws_in_callback_interval": Shape(
        ScaledByCallback, callbacks=lambda: [DrawsCallback()], trainer=INTERVAL
    ),
    "leaves_early": Shape(LeavesEarly),
    "leaves_early_interval": Shape(
        LeavesEarly, trainer={**INTERVAL, "check_val_every_n_epoch": None}
    ),
    "stops_on_plateau": Shape(callbacks=lambda: [StopsOnPlateau()], trainer=INTERVAL),
    "overrides": Shape(Overrides),
    "overrides_accumulate": Shape(Overrides, trainer={"accumulate_grad_batches": 2}),
    "unfreezes": Shape(Unfreezes),
    "profiled_simple": Shape(Profiled, trainer={"profiler": "simple"}),
    "profiled_advanced": Shape(Profiled, trainer={"profiler": "advanced"}),
    "resets_optimizer": Shape(ResetsOptimizer),
    "clears_state": Shape(ClearsState),
    "reads_trainer": Shape(ReadsTrainer),
    "reads_trainer_interval": Shape(ReadsTrainer, trainer=INTERVAL),
    "reads_trainer_accumulate": Shape(
        ReadsTrainer, trainer={"accumulate_grad_batches": 3, "val_check_interval": 4}
    ),
    "manual_plateau": Shape(ManualPlateau),
    "manual_plateau_interval": Shape(ManualPlateau, trainer=INTERVAL),
    "gradient_cache": Shape(GradientCache),
    "duration": Shape(callbacks=lambda: [Duration()], clocks=("clock/",)),
    "many_flags": Shape(
        trainer={
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 0.3,
            "limit_train_batches": 0.75,
            "limit_val_batches": 0.5,
            "val_check_interval": 0.5,
            "precision": "bf16-mixed",
            "log_every_n_steps": 1,
            "min_epochs": 2,
            "deterministic": True,
            "benchmark": False,
        },
        callbacks=lambda: [EarlyStopping("val/loss", patience=1), LearningRateMonitor("step")],
    ),
}

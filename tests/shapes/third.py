"""Trainings as public examples write them: replay, contrast, distillation, curricula, adapters."""

import copy
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torchmetrics as tm
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import swa_utils
from torch.utils import data as d
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from shapes.base import (
    BATCH,
    TRAIN,
    Manual,
    Net,
    Samples,
    Shape,
    data,
    resumable,
    tensors,
)

INTERVAL = {"val_check_interval": 3}
WORKERS = {"num_workers": 2, "multiprocessing_context": "fork"}
mse = nn.functional.mse_loss


# -- reinforcement --------------------------------------------------------------------------------


class Experience(NamedTuple):
    state: np.ndarray
    action: int
    reward: float
    after: np.ndarray


class Walk:
    """An environment with a state and a generator of its own."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(4)
        self.state = np.zeros(4, np.float32)

    def step(self, action: int) -> tuple[np.ndarray, float]:
        self.state = (0.9 * self.state + self.rng.normal(size=4) * (action + 1)).astype(np.float32)
        return self.state, float(-np.abs(self.state).sum())


class Buffer:
    def __init__(self) -> None:
        self.items: deque[Experience] = deque(maxlen=60)

    def sample(self, count: int) -> list[Experience]:
        places = np.random.choice(len(self.items), count, replace=False)
        return [self.items[place] for place in places]


class Replayed(IterableDataset[Any]):
    def __init__(self, buffer: Buffer) -> None:
        self.buffer = buffer

    def __iter__(self) -> Iterator[Any]:
        for one in self.buffer.sample(30):
            yield one.state, one.action, one.reward, one.after


class Dqn(Net):
    """As Lightning's own example: the loader reads what the steps play."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        self.target = copy.deepcopy(self.net)
        self.buffer, self.env = Buffer(), Walk()
        self.total_reward, self.epsilon = 0.0, 1.0
        for _ in range(40):
            self.play()

    @torch.no_grad()
    def play(self) -> None:
        state = self.env.state
        greedy = int(self.net(torch.from_numpy(state)).argmax())
        action = random.randrange(2) if random.random() < self.epsilon else greedy
        after, reward = self.env.step(action)
        self.total_reward += reward
        self.buffer.items.append(Experience(state, action, reward, after))

    def train_dataloader(self) -> Any:
        return DataLoader(Replayed(self.buffer), 5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        state, action, reward, after = batch
        self.epsilon = max(0.1, self.epsilon - 0.03)
        self.play()
        q = self.net(state).gather(1, action.view(-1, 1)).squeeze(1)
        with torch.no_grad():
            best = self.target(after).max(1).values
        loss = mse(q, reward.float() + 0.9 * best)
        if self.global_step % 4 == 0:
            self.target.load_state_dict(self.net.state_dict())
        self.log_dict({"reward": self.total_reward, "loss": loss})
        return loss


class Prioritized(Net):
    """Batches of the past by their losses, in arrays that go round."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = np.zeros((16, 4), np.float32), np.zeros((16, 1), np.float32)
        self.worth, self.place, self.filled = np.zeros(16), 0, 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for x, y in zip(*batch, strict=True):
            self.x[self.place], self.y[self.place] = x.numpy(), y.numpy()
            self.worth[self.place] = self.worth.max(initial=1.0)
            self.place = (self.place + 1) % 16
            self.filled = min(self.filled + 1, 16)
        share = self.worth[: self.filled] / self.worth[: self.filled].sum()
        chosen = np.random.choice(self.filled, 3, p=share)
        old = self(torch.from_numpy(self.x[chosen])) - torch.from_numpy(self.y[chosen])
        self.worth[chosen] = old.detach().abs().flatten().numpy() + 1e-3
        return super().training_step(batch, batch_idx) + old.square().mean()


class Rollouts(Manual):
    """Policy gradients: a whole epoch of an environment is played in a hook, then learned from."""

    def __init__(self) -> None:
        super().__init__()
        self.env, self.rollout = Walk(), []
        self.baseline = None

    def on_train_epoch_start(self) -> None:
        self.rollout = [self.env.step(random.randrange(2)) for _ in range(20)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        state, reward = self.rollout[batch_idx % len(self.rollout)]
        mean = self.baseline if self.baseline is not None else reward
        self.baseline = 0.9 * mean + 0.1 * reward
        loss = super().training_step(batch, batch_idx)
        value = self(torch.from_numpy(state)) - (reward - self.baseline)
        self.optimizers().zero_grad()
        self.manual_backward(value.square().mean())
        self.optimizers().step()
        return loss


# -- contrast, distillation, averages ---------------------------------------------------------------


class Moco(Net):
    """A momentum encoder and a queue that begins with noise."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        self.register_buffer("queue", nn.functional.normalize(torch.randn(6, 1), dim=0))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            for p, q in zip(self.net.parameters(), self.slow.parameters(), strict=True):
                q.data = q.data * 0.9 + p.data * 0.1
            keys = self.slow(batch[0] + 0.1 * torch.randn_like(batch[0]))
            at = int(self.place)
            self.queue[at : at + 2] = keys[:2]
            self.place[0] = (at + 2) % 6
        return loss + (self(batch[0]) @ self.queue.T).square().mean() * 0.1


class GrowingMemory(Net):
    """A buffer that becomes longer with each batch: a bank of all that was seen."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(0, 4), persistent=persistent)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.memory = torch.cat([self.memory, batch[0]])[-30:]
        return super().training_step(batch, batch_idx) + 0.1 * self(self.memory).square().mean()


class LateBuffer(Net):
    """None until the first batch, as `ActNorm` and codebooks are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", None)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.mean is None:
            self.mean = batch[0].mean(0)
        return super().training_step((batch[0] - self.mean, batch[1]), batch_idx)


class SwaByHand(Net):
    """torch's own averages, by hand, with its schedule."""

    def __init__(self, hold: Any) -> None:
        super().__init__()
        self.averaged = hold(swa_utils.AveragedModel(self.net))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        self.rates = swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=4)
        return optimizer

    def _average(self) -> Any:
        return self.averaged[0] if isinstance(self.averaged, list) else self.averaged

    def on_train_batch_end(self, *args: Any) -> None:
        if self.current_epoch:
            self._average().update_parameters(self.net)
            self.rates.step()

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val/loss", mse(self._average()(batch[0]), batch[1]))


class EmaWithBackup(Callback):
    """Shadow weights, swapped in for validations, as in many a repository."""

    def __init__(self) -> None:
        self.shadow: dict[str, Tensor] = {}
        self.backup: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.shadow = {n: p.data.clone() for n, p in module.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        for n, p in module.named_parameters():
            self.shadow[n] = 0.9 * self.shadow[n] + 0.1 * p.data

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        for n, p in module.named_parameters():
            self.backup[n] = p.data
            p.data = self.shadow[n]

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        for n, p in module.named_parameters():
            p.data = self.backup[n]
        self.backup = {}


class Distilled(Net):
    """A frozen teacher of the same start, its temperature by the epoch, born again each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher: Any = None
        self.temperature = 4.0

    def on_train_epoch_start(self) -> None:
        self.temperature = 4.0 / (1 + self.current_epoch)

    def on_train_epoch_end(self) -> None:
        self.teacher = copy.deepcopy(self.net).eval().requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if self.teacher is None:
            return loss
        return loss + mse(self(batch[0]), self.teacher(batch[0])) / self.temperature


class OutsideTeacher(Distilled):
    def on_train_epoch_end(self) -> None:
        self.teachers = [copy.deepcopy(self.net).eval().requires_grad_(False)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for teacher in getattr(self, "teachers", []):
            loss = loss + mse(self(batch[0]), teacher(batch[0])) / self.temperature
        return loss


class Lora(nn.Module):
    """A frozen layer with an adapter that is merged for evaluation."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a = nn.Parameter(torch.randn(2, layer.in_features) * 0.1)
        self.b = nn.Parameter(torch.zeros(layer.out_features, 2))
        self.merged = False

    def merge(self, merged: bool) -> None:
        if merged != self.merged:
            self.layer.weight.data += (1 if merged else -1) * (self.b @ self.a).data
            self.merged = merged

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if self.merged else y + x @ self.a.T @ self.b.T


class Adapted(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[0], self.net[2] = Lora(self.net[0]), Lora(self.net[2])

    def on_validation_start(self) -> None:
        for part in (self.net[0], self.net[2]):
            part.merge(True)

    def on_validation_end(self) -> None:
        for part in (self.net[0], self.net[2]):
            part.merge(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Recurrent(Net):
    """Truncated backpropagation through time: the hidden state goes on from batch to batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 4)
        self.hidden: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y, hidden = self.cell(x.unsqueeze(1), self.hidden if self.training else None)
        if self.training:
            self.hidden = tuple(h.detach() for h in hidden)
        return self.net(y.squeeze(1))


class Toggles(Manual):
    """Toggled for several batches in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(4, 1)
        self.other.weight.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net.parameters(), lr=0.1),
            torch.optim.Adam(self.other.parameters(), lr=0.1),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        one, two = self.optimizers()
        if batch_idx % 5 == 0:
            self.toggle_optimizer(two)
        optimizer = two if batch_idx % 5 < 3 else one
        if batch_idx % 5 == 3:
            self.untoggle_optimizer(two)
        optimizer.zero_grad()
        loss = mse(self(batch[0]) + self.other(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()
        return loss


class ClipsAll(Net):
    """Only the head is trained, and the clipping counts the others' gradients too, which nobody
    sets to zero.
    """

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[2].parameters(), lr=0.1)

    def on_after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.5)


class ReadsOther(ClipsAll):
    def on_after_backward(self) -> None:
        size = sum(p.grad.abs().sum() for p in self.parameters() if p.grad is not None)
        for p in self.net[2].parameters():
            assert p.grad is not None
            p.grad /= 1 + size


class Ewc(Net):
    """Elastic weights: importance summed up from gradients, anchors taken at each epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors: dict[str, Tensor] = {}
        self.fisher = {n: torch.zeros_like(p) for n, p in self.named_parameters()}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for n, p in self.named_parameters():
            if p.grad is not None:
                self.fisher[n] += p.grad.detach().square()

    def on_train_epoch_end(self) -> None:
        self.anchors = {n: p.detach().clone() for n, p in self.named_parameters()}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        for n, p in self.named_parameters():
            if n in self.anchors:
                loss = loss + (self.fisher[n] * (p - self.anchors[n]).square()).sum()
        return loss


class Functional(Net):
    """Weights as a plain dict, by torch.func; an optimizer over these alone."""

    def __init__(self) -> None:
        super().__init__()
        self.values = {
            n: p.detach().clone().requires_grad_() for n, p in self.net.named_parameters()
        }
        self.net.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.net, self.values, (x,))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.values.values(), lr=0.05)


class Ensemble(Net):
    """Stacked weights under vmap."""

    def __init__(self) -> None:
        super().__init__()
        nets = [nn.Linear(4, 1) for _ in range(3)]
        values, _ = torch.func.stack_module_state(nets)
        self.stacked = nn.ParameterDict({n: nn.Parameter(v.detach()) for n, v in values.items()})
        self.base = [copy.deepcopy(nets[0]).to("meta")]

    def forward(self, x: Tensor) -> Tensor:
        def one(values: Any) -> Tensor:
            return torch.func.functional_call(self.base[0], values, (x,))

        return torch.vmap(one)(dict(self.stacked)).mean(0) + self.net(x)


class Meta(Manual):
    """MAML: an inner step on a copy, Reptile's outer one by hand."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        inner = copy.deepcopy(self.net)
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            loss = mse(inner(batch[0]), batch[1])
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            for p, q in zip(self.net.parameters(), inner.parameters(), strict=True):
                p.lerp_(q, 0.3)
        self.optimizers().step()
        return loss


class Scripted(Net):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.net = make(self.net)


class Grows(Net):
    """A layer becomes wider in mid-training, its optimizer is told."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            old = self.net[0]
            self.net[0] = nn.Linear(4, 10)
            self.net[2] = nn.Linear(10, 1)
            self.net[0].weight.data[:8] = old.weight.data
            group = self.trainer.optimizers[0].param_groups[0]
            group["params"] = list(self.parameters())
            self.trainer.optimizers[0].state.clear()


class KeepsOfValidation(Net):
    """What was seen in a validation scales what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Any = torch.ones(4)
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        super().validation_step(batch, batch_idx)
        self.outputs.append(self(batch[0]).flatten())
        self.kept = batch[0].mean(0)

    def on_validation_epoch_end(self) -> None:
        self.log("val/outputs", torch.cat(self.outputs).mean())
        self.outputs.clear()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0] * self.kept.clone(), batch[1]), batch_idx)


class UsesOther(Net):
    """A second loader under an endless iterator: semi-supervised code has it so."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def on_train_start(self) -> None:
        self.unlabeled = self.make()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = next(self.unlabeled)[0]
        return super().training_step(batch, batch_idx) + 0.1 * self(x).square().mean()


class EndlessLoader:
    """Begins again by itself."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.iterator = loader, iter(loader)

    def __next__(self) -> Any:
        try:
            return next(self.iterator)
        except StopIteration:
            self.iterator = iter(self.loader)
            return next(self.iterator)


def unlabeled() -> Any:
    return DataLoader(TensorDataset(*tensors(24, 3)), 6, shuffle=True)


class OddState(Callback):
    """Its state_dict holds what it likes."""

    def __init__(self, value: Any, change: Any) -> None:
        self.held, self.change = copy.deepcopy(value), change

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        replaced = self.change(self.held)
        if replaced is not None:
            self.held = replaced

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = state["held"]


class Named2(Callback):
    """With a name that another one's second would have."""

    def __init__(self) -> None:
        self.n = 0

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        self.n += 1
        trainer.optimizers[0].param_groups[0]["lr"] = 0.05 / self.n


class Named(Callback):
    def __init__(self) -> None:
        self.other = 0


class NoiseOnGradients(Callback):
    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(9)

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        scale = 0.1 / (1 + trainer.global_step) ** 0.55
        for p in module.parameters():
            p.grad += scale * torch.randn(p.shape, generator=self.generator)


class ClipsByHistory(Callback):
    """AutoClip: the quantile of all norms until now."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        norm = nn.utils.get_total_norm([p.grad for p in module.parameters()])
        self.norms.append(float(norm))
        nn.utils.clip_grad_norm_(module.parameters(), float(np.percentile(self.norms, 10)))


class RestartsByHand(Net):
    """A schedule that Lightning is not told of, stepped in a hook with a fraction."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        self.restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2)
        return optimizer

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.restarts.step(self.current_epoch + batch_idx / 10)


class RestartsCounting(RestartsByHand):
    def on_train_batch_end(self, *args: Any) -> None:
        self.restarts.step()


class LayerWise(Net):
    """A rate for each layer, two schedules of other intervals."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": [p], "lr": 0.1 * 0.7**i} for i, p in enumerate(self.parameters())]
        optimizer = torch.optim.AdamW(groups)
        s = torch.optim.lr_scheduler
        configs = [
            {"scheduler": s.ExponentialLR(optimizer, 0.97), "interval": "step", "frequency": 3},
            {"scheduler": s.StepLR(optimizer, 2), "interval": "epoch"},
        ]
        return [optimizer], configs


class Lion(torch.optim.Optimizer):
    """Of a public repository; counts its steps beside its state."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})
        self.steps = 0
        self.rng = torch.Generator().manual_seed(2)
        self.norms: dict[Any, float] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["mean"], state["seen"] = torch.zeros_like(p), []
                state["seen"] = [*state["seen"][-2:], float(p.grad.norm())]
                state["mean"].lerp_(p.grad, 0.1)
                noise = torch.randn(p.shape, generator=self.rng) * 0.001
                rate = group["lr"] / self.steps**0.5 * (1 + 0.01 * sum(state["seen"]))
                p.add_(state["mean"].sign() + noise, alpha=-rate)
        return loss


class OwnOptimizer(Net):
    def configure_optimizers(self) -> Any:
        return Lion(self.parameters())


class StringMetric(tm.Metric):
    """A list as its state, and texts beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.add_state("values", [], dist_reduce_fx="cat")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.longest = ""

    def update(self, values: Tensor) -> None:
        self.words += [f"{float(v):.3f}" for v in values.flatten()]
        self.values.append(values.detach().flatten())
        self.count += len(values)
        self.longest = max(self.longest, *self.words, key=len)

    def compute(self) -> Tensor:
        values = tm.utilities.dim_zero_cat(self.values)
        return values.mean() + len(set(self.words)) + self.count + len(self.longest)

    def reset(self) -> None:
        super().reset()
        self.words = []


class PairMetric(StringMetric):
    """Of two: the collection gives it both."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds - target)


class Nested(Net):
    """Collections in collections, prefixes, a dict of them by the stage."""

    def __init__(self) -> None:
        super().__init__()
        regression = tm.MetricCollection({"mae": tm.MeanAbsoluteError(), "r2": tm.R2Score()})
        more = tm.MetricCollection([tm.MeanSquaredError(), PairMetric()], prefix="more_")
        both = tm.MetricCollection([regression, more])
        self.measured = nn.ModuleDict({s: both.clone(prefix=f"{s}/") for s in ("train_", "val_")})

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.measured["train_"].update(self(batch[0]).detach(), batch[1])
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.measured["val_"].update(self(batch[0]), batch[1])

    def on_train_epoch_end(self) -> None:
        self.log_dict(self.measured["train_"].compute())
        self.measured["train_"].reset()

    def on_validation_epoch_end(self) -> None:
        self.log_dict(self.measured["val_"].compute())
        self.measured["val_"].reset()


class TextMeasured(Net):
    def __init__(self) -> None:
        super().__init__()
        self.texts = StringMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.texts(self(batch[0]))
        self.log("texts", self.texts, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


class Qat(Net):
    """Fake quantization with observers, which are frozen in the second epoch."""

    def __init__(self) -> None:
        super().__init__()
        from torch.ao import quantization as q

        self.fake = q.FakeQuantize(q.MovingAverageMinMaxObserver, quant_min=0, quant_max=255)
        self.weights = q.FakeQuantize(
            q.MovingAveragePerChannelMinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_channel_symmetric,
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weights(self.net[0].weight)
        return self.net[2](self.fake(nn.functional.linear(x, weight).relu()))

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.fake.disable_observer()


SHAPES = {
    "dqn": Shape(model=Dqn, data=dict, trainer={"limit_val_batches": 0}),
    "prioritized": Shape(model=Prioritized),
    "rollouts": Shape(model=Rollouts),
    "moco": Shape(model=Moco),
    "memory_grows": Shape(model=lambda: GrowingMemory(True)),
    "memory_grows_left_out": Shape(model=lambda: GrowingMemory(False)),
    "late_buffer": Shape(model=LateBuffer),
    "swa_by_hand": Shape(model=lambda: SwaByHand(lambda a: a)),
    "swa_by_hand_listed": Shape(model=lambda: SwaByHand(lambda a: [a]), trainer=INTERVAL),
    "ema_backup": Shape(callbacks=lambda: [EmaWithBackup()], trainer=INTERVAL),
    "distilled": Shape(model=Distilled),
    "distilled_outside": Shape(model=OutsideTeacher),
    "lora": Shape(model=Adapted, trainer=INTERVAL),
    "recurrent": Shape(model=Recurrent, trainer=INTERVAL),
    "toggles": Shape(model=Toggles),
    "clips_all": Shape(model=ClipsAll),
    "reads_other": Shape(model=ReadsOther),
    "ewc": Shape(model=Ewc),
    "functional": Shape(model=Functional, extra=lambda m, t: m.values),
    "ensemble": Shape(model=Ensemble),
    "meta": Shape(model=Meta),
    "scripted": Shape(model=lambda: Scripted(torch.jit.script)),
    "traced": Shape(model=lambda: Scripted(lambda n: torch.jit.trace(n, torch.ones(1, 4)))),
    "symbolic": Shape(model=lambda: Scripted(torch.fx.symbolic_trace)),
    "grows": Shape(model=Grows),
    "keeps_of_validation": Shape(model=KeepsOfValidation, trainer=INTERVAL),
    "other_cycle": Shape(model=lambda: UsesOther(lambda: itertools.cycle(unlabeled()))),
    "other_endless": Shape(model=lambda: UsesOther(lambda: EndlessLoader(unlabeled()))),
    "names_collide": Shape(callbacks=lambda: [Named2(), Named()]),
    "names_collide_late": Shape(callbacks=lambda: [Named(), Named2(), Named()]),
    "gradient_noise": Shape(callbacks=lambda: [NoiseOnGradients()]),
    "auto_clip": Shape(callbacks=lambda: [ClipsByHistory()]),
    "restarts_by_hand": Shape(model=RestartsByHand),
    "restarts_counting": Shape(model=RestartsCounting),
    "layer_wise": Shape(model=LayerWise, trainer=INTERVAL),
    "lion": Shape(model=OwnOptimizer),
    "nested_collections": Shape(model=Nested, trainer=INTERVAL),
    "metric_of_texts": Shape(model=TextMeasured),
    "qat": Shape(model=Qat),
    "fast_dev_run": Shape(trainer={"fast_dev_run": 3}),
    "two_at_once": Shape(callbacks=lambda: [EmaWithBackup(), ClipsByHistory(), NoiseOnGradients()]),
}


ODD: dict[str, tuple[Any, Any]] = {
    "set": (set(), lambda v: v.add(len(v))),
    "numpy_bool": (np.bool_(True), lambda v: ~v),
    "ordered": (OrderedDict(a=1), lambda v: OrderedDict(b=1, a=v["a"] + 1)),
}  # fmt: skip
SHAPES |= {
    f"callback_state_{name}": Shape(callbacks=lambda parts=parts: [OddState(*parts)])
    for name, parts in ODD.items()
}


# -- data ---------------------------------------------------------------------------------------------


class Lossy(Net):
    """Tells the sampler of the next epoch which samples were hard."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        self.trainer.datamodule.note(index, (self(x) - y).detach().abs().flatten())
        return super().training_step((x, y), batch_idx)


class Indexed(Samples):
    def __getitem__(self, index: int) -> Any:
        return (*super().__getitem__(index), index)


class ByLoss(LightningDataModule):
    """The weights of a sampler of torch, written at each batch or for the epoch to come."""

    def __init__(self, at_once: bool) -> None:
        super().__init__()
        self.at_once = at_once
        self.sampler = d.WeightedRandomSampler(torch.ones(TRAIN), TRAIN)
        self.losses = torch.ones(TRAIN, dtype=torch.double)

    def note(self, index: Tensor, losses: Tensor) -> None:
        self.losses[index] = losses.double()
        if self.at_once:
            self.sampler.weights[index] = losses.double()

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(Indexed(), BATCH, sampler=self.sampler))


class Reweights(Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.datamodule.sampler.weights = trainer.datamodule.losses.clone()


class HardSampler(d.Sampler[int]):
    """Of the user's own, that reads the model."""

    def __init__(self, module: list[Any]) -> None:
        self.module = module

    def __len__(self) -> int:
        return TRAIN

    def __iter__(self) -> Iterator[int]:
        x, y = tensors()
        with torch.no_grad():
            loss = (self.module[0](x) - y).abs().flatten() if self.module else torch.ones(TRAIN)
        return iter(torch.multinomial(loss, TRAIN).tolist())


class ReadsModel(LightningDataModule):
    def train_dataloader(self) -> Any:
        holder = [self.trainer.lightning_module]
        return resumable(DataLoader(Samples(), BATCH, sampler=HardSampler(holder)))


class ByLength(d.BatchSampler):
    """Buckets by length, shuffled among themselves; more in a batch with each epoch."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = sorted(range(TRAIN), key=lambda i: (i * 7) % 13)
        batches = [order[i : i + 4 + self.epoch] for i in range(0, TRAIN, 4 + self.epoch)]
        random.shuffle(batches)
        yield from batches

    def __len__(self) -> int:
        return -(-TRAIN // (4 + self.epoch))


class Resizes(Samples):
    """A progressive size, set from outside."""

    size = 1.0

    def __getitem__(self, index: int) -> Any:
        return self.x[index] * self.size, self.y[index]


class Progressive(LightningDataModule):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.samples, self.arguments = Resizes(), arguments

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(self.samples, BATCH, shuffle=True, **self.arguments))


class Resize(Callback):
    def __init__(self, hook: str) -> None:
        self.hook = hook

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if self.hook == "epoch":
            trainer.datamodule.samples.size = 1 + trainer.current_epoch / 2

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if self.hook == "batch":
            trainer.datamodule.samples.size += 0.05


CLASS_RNG = np.random.default_rng(8)


class ClassRng(Samples):
    rng = random.Random(3)

    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * self.rng.random(), self.y[index]


class GlobalRng(Samples):
    def __getitem__(self, index: int) -> Any:
        return self.x[index] + 0.1 * float(CLASS_RNG.normal()), self.y[index]


class SlotRng:
    __slots__ = ("rng",)

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)

    def __call__(self, x: Tensor) -> Tensor:
        return x + 0.1 * float(self.rng.normal())


class Transforms(Samples):
    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.transform = transform

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.x[index]), self.y[index]


def default_rng_in_a_default(x: Tensor, rng: Any = np.random.default_rng(5)) -> Tensor:  # noqa: B008
    return x + 0.1 * float(rng.normal())


class ByWorker(Samples):
    def __getitem__(self, index: int) -> Any:
        info = d.get_worker_info()
        return self.x[index] * (1 + 0.1 * (info.id if info else 0)), self.y[index]


class Caches(Samples):
    """A random augmentation that is drawn once for each sample, and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[int, Any] = {}

    def __getitem__(self, index: int) -> Any:
        if index not in self.cache:
            self.cache[index] = self.x[index] + 0.1 * torch.randn(4)
        return self.cache[index], self.y[index]


class CollateCounts:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, samples: list[Any]) -> Any:
        self.calls += 1
        x, y = d.default_collate(samples)
        share = np.random.beta(1 / self.calls, 1)
        return x * (1 - 0.1 * share), y


class Sharded(IterableDataset[Any]):
    """A stream that workers share, with an epoch of its own."""

    def __init__(self) -> None:
        self.epoch = 0
        self.rng = random.Random(1)

    def __iter__(self) -> Iterator[Any]:
        self.epoch += 1
        info = d.get_worker_info()
        x, y = tensors()
        order = list(range(TRAIN))
        self.rng.shuffle(order)
        for i in order[info.id :: info.num_workers] if info else order:
            yield x[i] * self.epoch, y[i]


class GoesOn(Sharded):
    """Its stream is one, and each epoch takes the next part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.source = iter(range(10_000))

    def __iter__(self) -> Iterator[Any]:
        x, y = tensors()
        for i in itertools.islice(self.source, TRAIN):
            yield x[i % TRAIN] * (1 + i / 100), y[i % TRAIN]


class OwnLoader(DataLoader[Any]):
    """Counts its epochs, and grows what it gives."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rounds = 0

    def __iter__(self) -> Any:
        self.rounds += 1
        for x, y in super().__iter__():
            yield x * self.rounds, y


class ToldEpochs(Samples):
    """Told of the epoch by a shared value."""

    def __init__(self, shared: Any) -> None:
        super().__init__()
        self.shared = shared

    def __getitem__(self, index: int) -> Any:
        return self.x[index] * (1 + self.shared.value), self.y[index]


class Tells(Callback):
    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        trainer.datamodule.shared.value += 1


class SharedEpoch(LightningDataModule):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.shared = torch.multiprocessing.get_context("fork").Value("i", 0)
        self.arguments = arguments

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(ToldEpochs(self.shared), BATCH, shuffle=True, **self.arguments))


class Drawn(LightningDataModule):
    """Its data are drawn when the loader is made."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        if where == "init":
            self.x = torch.rand(TRAIN, 4)

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.x = torch.rand(TRAIN, 4)

    def train_dataloader(self) -> Any:
        x = torch.rand(TRAIN, 4) if self.where == "loader" else self.x
        return resumable(DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), BATCH, shuffle=True))


class Folded(LightningDataModule):
    """Split by a draw, in `setup`."""

    def setup(self, stage: str) -> None:
        self.parts = d.random_split(TensorDataset(*tensors(52)), [40, 12])

    def train_dataloader(self) -> Any:
        return resumable(DataLoader(self.parts[0], BATCH, shuffle=True))

    def val_dataloader(self) -> Any:
        return DataLoader(self.parts[1], BATCH)


class RandomFeatures(Net):
    """A projection that is drawn once, and is no weight."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind == "buffer":
            self.register_buffer("projection", torch.randn(4, 4), persistent=False)
        else:
            self.projection = torch.randn(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x @ self.projection).cos())


class Unsized(d.Sampler[int]):
    """Without a length."""

    def __iter__(self) -> Iterator[int]:
        yield from torch.randperm(TRAIN).tolist()


def loader(samples: Any, **arguments: Any) -> Any:
    arguments = {"batch_size": BATCH, "shuffle": True, **arguments}
    return data(lambda: resumable(DataLoader(samples(), **arguments)))


def collated(collate: Any) -> Any:
    return data(lambda: resumable(DataLoader(Samples(), BATCH, shuffle=True, collate_fn=collate())))


def reset_rngs() -> None:
    ClassRng.rng.seed(3)
    CLASS_RNG.bit_generator.state = np.random.PCG64(8).state
    default_rng_in_a_default.__defaults__[0].bit_generator.state = np.random.PCG64(5).state  # type: ignore[index]


TWO = {"max_epochs": 2}
KEPT = {**WORKERS, "persistent_workers": True}
SHAPES |= {
    "by_loss_of_the_epoch": Shape(Lossy, lambda: ByLoss(False), lambda: [Reweights()], {"limit_val_batches": 0}),
    "by_loss_at_once": Shape(Lossy, lambda: ByLoss(True), trainer={"limit_val_batches": 0}),
    "sampler_reads_model": Shape(data=ReadsModel),
    "by_length": Shape(data=data(lambda: resumable(DataLoader(Samples(), batch_sampler=ByLength())))),
    "progressive": Shape(data=Progressive, callbacks=lambda: [Resize("epoch")]),
    "progressive_batches": Shape(data=Progressive, callbacks=lambda: [Resize("batch")]),
    "progressive_workers": Shape(data=lambda: Progressive(**WORKERS), callbacks=lambda: [Resize("epoch")],
                                 trainer=TWO, slow=True),
    "progressive_kept": Shape(data=lambda: Progressive(**KEPT), callbacks=lambda: [Resize("epoch")], trainer=TWO,
                              slow=True),
    "class_rng": Shape(data=loader(ClassRng), reset=reset_rngs),
    "class_rng_workers": Shape(data=loader(ClassRng, **WORKERS), reset=reset_rngs, trainer=TWO, slow=True),
    "global_rng": Shape(data=loader(GlobalRng), reset=reset_rngs),
    "global_rng_workers": Shape(data=loader(GlobalRng, **WORKERS), reset=reset_rngs, trainer=TWO, slow=True),
    "slot_rng": Shape(data=loader(lambda: Transforms(SlotRng()))),
    "slot_rng_workers": Shape(data=loader(lambda: Transforms(SlotRng()), **WORKERS), trainer=TWO, slow=True),
    "default_rng": Shape(data=loader(lambda: Transforms(default_rng_in_a_default)), reset=reset_rngs),
    "default_rng_workers": Shape(data=loader(lambda: Transforms(default_rng_in_a_default), **WORKERS), reset=reset_rngs,
                                 trainer=TWO, slow=True),
    "by_worker": Shape(data=loader(ByWorker, **WORKERS), trainer=TWO, slow=True),
    "caches": Shape(data=loader(Caches)),
    "caches_workers": Shape(data=loader(Caches, **WORKERS), trainer=TWO, slow=True),
    "collate_counts": Shape(data=collated(CollateCounts)),
    "sharded": Shape(data=data(lambda: DataLoader(Sharded(), BATCH))),
    "sharded_workers": Shape(data=data(lambda: DataLoader(Sharded(), BATCH, **WORKERS)), trainer=TWO, slow=True),
    "stream_goes_on": Shape(data=data(lambda: DataLoader(GoesOn(), BATCH))),
    "own_loader": Shape(data=data(lambda: OwnLoader(Samples(), BATCH, shuffle=True))),
    "shared_epoch": Shape(data=SharedEpoch, callbacks=lambda: [Tells()]),
    "shared_epoch_workers": Shape(data=lambda: SharedEpoch(**KEPT), callbacks=lambda: [Tells()], trainer=TWO, slow=True),
    "unsized_sampler": Shape(data=data(lambda: resumable(DataLoader(Samples(), BATCH, sampler=Unsized())))),
    "image_transforms": Shape(data=loader(lambda: Transforms(image_transform()))),
}  # fmt: skip


def image_transform() -> Any:
    from torchvision.transforms import v2

    parts = [
        v2.RandomHorizontalFlip(),
        v2.GaussianNoise(0, 0.1),
        v2.RandomErasing(scale=(0.3, 0.5)),
    ]
    whole = v2.Compose(parts)
    return lambda x: whole(x.view(1, 2, 2)).flatten()


for where in ("init", "setup", "loader"):
    for every in (0, 1):
        SHAPES[f"drawn_in_{where}{'_each_epoch' * every}"] = Shape(
            data=lambda where=where: Drawn(where),
            trainer={"reload_dataloaders_every_n_epochs": every},
        )
SHAPES |= {
    "unseeded_moco": Shape(model=Moco, seeded=False),
    "unseeded_dqn": Shape(model=Dqn, data=dict, trainer={"limit_val_batches": 0}, seeded=False),
}  # fmt: skip
# Without a seed, another start draws other data, and nothing says so yet: no test.
OPEN = {
    "unseeded_drawn_init": Shape(data=lambda: Drawn("init"), seeded=False),
    "unseeded_drawn_setup": Shape(data=lambda: Drawn("setup"), seeded=False),
    "unseeded_drawn_loader": Shape(data=lambda: Drawn("loader"), seeded=False),
    "unseeded_split": Shape(data=Folded, seeded=False),
    "unseeded_features": Shape(model=lambda: RandomFeatures("attribute"), seeded=False),
    "unseeded_features_buffer": Shape(model=lambda: RandomFeatures("buffer"), seeded=False),
}  # fmt: skip

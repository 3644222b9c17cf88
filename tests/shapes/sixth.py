"""Trainings in the manner of public model zoos: actors and critics, codebooks, GANs, averages."""

import copy
import dataclasses
import math
import random
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torchmetrics as tm
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
)
from lightning.pytorch.utilities import grad_norm
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import swa_utils
from torch.utils.data import DataLoader, IterableDataset

from shapes.base import BATCH, TRAIN, Manual, Net, Samples, Shape, data, resumable

INTERVAL = {"val_check_interval": 3}
mse = nn.functional.mse_loss


# -- reinforcement --------------------------------------------------------------------------------


class Box:
    """A space with a generator of its own, as gym has them."""

    def __init__(self, seed: int) -> None:
        self._np_random = None
        self._seed = seed

    @property
    def np_random(self) -> np.random.Generator:
        if self._np_random is None:
            self._np_random = np.random.default_rng(self._seed)
        return self._np_random

    def sample(self) -> np.ndarray:
        return self.np_random.uniform(-1, 1, 2).astype(np.float32)


class Pendulum:
    def __init__(self) -> None:
        self.action_space = Box(3)
        self.np_random, self.state, self.steps = np.random.default_rng(1), None, 0

    def reset(self) -> np.ndarray:
        self.state, self.steps = self.np_random.normal(size=4).astype(np.float32), 0
        return self.state

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool]:
        self.steps += 1
        noise = self.np_random.normal(size=4) * 0.1
        self.state = (0.9 * self.state + np.tile(action, 2) + noise).astype(np.float32)
        return self.state, -float(np.square(self.state).sum()), self.steps >= 7


class Wrapper:
    """Forwards what it does not know, as gym's wrappers do."""

    def __init__(self, env: Any) -> None:
        self.env = env

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.env, name)


class Episodes(Wrapper):
    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.returns: deque[float] = deque(maxlen=5)
        self.episode_return = 0.0

    def step(self, action: Any) -> Any:
        state, reward, done = self.env.step(action)
        self.episode_return += reward
        if done:
            self.returns.append(self.episode_return)
            self.episode_return = 0.0
        return state, reward, done


class RunningMeanStd:
    def __init__(self) -> None:
        self.mean, self.var, self.count = np.zeros(4), np.ones(4), 1e-4

    def update(self, x: np.ndarray) -> None:
        delta, total = x - self.mean, self.count + 1
        self.mean = self.mean + delta / total
        self.var = (self.var * self.count + np.square(delta) * self.count / total) / total
        self.count = total


class Normalized(Wrapper):
    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self.rms = RunningMeanStd()

    def step(self, action: Any) -> Any:
        state, reward, done = self.env.step(action)
        self.rms.update(state)
        return (
            ((state - self.rms.mean) / np.sqrt(self.rms.var + 1)).astype(np.float32),
            reward,
            done,
        )


class OrnsteinUhlenbeck:
    def __init__(self) -> None:
        self.state = np.zeros(2)

    def __call__(self) -> np.ndarray:
        self.state = self.state - 0.15 * self.state + 0.2 * np.random.randn(2)
        return self.state


Transition = namedtuple("Transition", "state action reward after")


class Ring:
    """Transitions in an array of objects, which goes round."""

    def __init__(self, size: int = 20) -> None:
        self.data = np.zeros(size, dtype=object)
        self.place, self.count = 0, 0

    def add(self, one: Transition) -> None:
        self.data[self.place] = one
        self.place = (self.place + 1) % len(self.data)
        self.count = min(self.count + 1, len(self.data))

    def sample(self, number: int) -> list[Transition]:
        return [self.data[i] for i in np.random.randint(0, self.count, number)]


class SumTree:
    def __init__(self, size: int = 16) -> None:
        self.size, self.tree, self.place = size, np.zeros(2 * size - 1), 0
        self.data: list[Any] = [None] * size

    def add(self, priority: float, item: Any) -> None:
        self.data[self.place] = item
        self.update(self.place + self.size - 1, priority)
        self.place = (self.place + 1) % self.size

    def update(self, node: int, priority: float) -> None:
        change = priority - self.tree[node]
        self.tree[node] = priority
        while node:
            node = (node - 1) // 2
            self.tree[node] += change

    def get(self, value: float) -> int:
        node = 0
        while 2 * node + 1 < len(self.tree):
            left = 2 * node + 1
            if value <= self.tree[left] or self.tree[left + 1] == 0:
                node = left
            else:
                value, node = value - self.tree[left], left + 1
        return node


class Sac(LightningModule):
    """Its temperature is a plain tensor with an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.actor, self.q = nn.Linear(4, 4), nn.Linear(6, 1)
        self.q_target = copy.deepcopy(self.q)
        self.log_alpha = torch.zeros(1, requires_grad=True)
        self.env, self.noise, self.buffer = (
            Normalized(Episodes(Pendulum())),
            OrnsteinUhlenbeck(),
            Ring(),
        )
        self.state = self.env.reset()
        for _ in range(6):
            self.play(self.env.action_space.sample())

    def play(self, action: np.ndarray) -> None:
        after, reward, done = self.env.step(action)
        self.buffer.add(Transition(self.state, action, reward, after))
        self.state = self.env.reset() if done else after

    def act(self, state: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(state).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-2, 1).exp())
        action = normal.rsample()
        return action.tanh(), normal.log_prob(action).sum(-1, keepdim=True)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.actor.parameters(), lr=0.01),
            torch.optim.Adam(self.q.parameters(), lr=0.01),
            torch.optim.Adam([self.log_alpha], lr=0.05),
        ]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            action = self.act(torch.from_numpy(self.state))[0].numpy()
        self.play(np.clip(action + self.noise(), -1, 1).astype(np.float32))
        rows = [np.stack(one) for one in zip(*self.buffer.sample(4), strict=True)]
        state, action, reward, after = (torch.from_numpy(np.float32(one)) for one in rows)
        actors, critics, alphas = self.optimizers()
        alpha = self.log_alpha.exp().detach()
        with torch.no_grad():
            new, log_prob = self.act(after)
            target = self.q_target(torch.cat([after, new], 1)) - alpha * log_prob
        q_loss = mse(self.q(torch.cat([state, action], 1)), reward.view(-1, 1) + 0.9 * target)
        self._step(critics, q_loss)
        new, log_prob = self.act(state)
        self._step(actors, (alpha * log_prob - self.q(torch.cat([state, new], 1))).mean())
        self._step(alphas, -(self.log_alpha * (log_prob - 2).detach()).mean())
        for p, q in zip(self.q.parameters(), self.q_target.parameters(), strict=True):
            q.data.mul_(0.9).add_(0.1 * p.data)
        self.log_dict({"q": q_loss, "alpha": alpha, "return": np.mean([0.0, *self.env.returns])})

    def _step(self, optimizer: Any, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Experience(IterableDataset[Any]):
    """Asks the module for its batches."""

    def __init__(self, generate: Any) -> None:
        self.generate = generate

    def __iter__(self) -> Iterator[Any]:
        return self.generate()


class ActorCritic(LightningModule):
    """Plays a rollout whenever the loader asks for more."""

    def __init__(self, wrap: bool = False) -> None:
        super().__init__()
        self.env, self.policy, self.critic = Episodes(Pendulum()), nn.Linear(4, 2), nn.Linear(4, 1)
        self.state = torch.from_numpy(self.env.reset())
        self.total_steps, self.wrap = 0, wrap
        self.batch_states: list[Tensor] = []
        self.batch_rewards: list[float] = []
        self.entropy_beta = 0.01

    def rollout(self) -> Iterator[Any]:
        for _ in range(8):
            for _ in range(5):
                action = (self.policy(self.state) + torch.randn(2)).detach()
                after, reward, done = self.env.step(action.numpy())
                self.batch_states.append(self.state)
                self.batch_rewards.append(reward)
                self.state = torch.from_numpy(self.env.reset() if done else after)
                self.total_steps += 1
            yield from zip(self.batch_states, self.batch_rewards, strict=True)
            self.batch_states.clear()
            self.batch_rewards.clear()

    def train_dataloader(self) -> Any:
        loader = DataLoader(Experience(self.rollout), batch_size=5)
        return resumable(loader) if self.wrap else loader

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        states, rewards = batch
        values = self.critic(states).flatten()
        self.entropy_beta *= 0.98
        loss = (
            mse(values, rewards.float()) + self.entropy_beta * self.policy(states).square().mean()
        )
        self.log("steps", float(self.total_steps))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.RMSprop(self.parameters(), lr=0.01)


class Prioritized(Net):
    """A tree of sums whose leaves are worth what they last lost."""

    def __init__(self) -> None:
        super().__init__()
        self.tree, self.beta = SumTree(), 0.4

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for one in zip(*batch, strict=True):
            self.tree.add(1.0, one)
        self.beta = min(1.0, self.beta + 0.02)
        nodes = [self.tree.get(random.uniform(0, self.tree.tree[0])) for _ in range(3)]
        nodes = [node for node in nodes if self.tree.data[node - self.tree.size + 1] is not None]
        loss = super().training_step(batch, batch_idx)
        for node in nodes:
            x, y = self.tree.data[node - self.tree.size + 1]
            error = mse(self(x), y)
            loss = loss + error * (16 * self.tree.tree[node]) ** -self.beta
            self.tree.update(node, float(error.detach()) + 1e-3)
        return loss


# -- codebooks, diffusion, flows --------------------------------------------------------------------


class Codebook(nn.Module):
    """Averages of what falls to each code; codes that nobody uses begin anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("initted", torch.tensor(False))
        self.register_buffer("embed", torch.zeros(6, 4))
        self.register_buffer("size", torch.ones(6), persistent=False)
        self.dead = 0

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor) -> None:
        hot = nn.functional.one_hot(codes, 6).float()
        self.size.mul_(0.8).add_(hot.sum(0), alpha=0.2)
        mean = hot.T @ x / hot.sum(0).clamp(min=1).unsqueeze(1)
        self.embed.data.lerp_(mean, 0.2)
        dead = self.size < 0.3
        self.dead += int(dead.sum())
        self.embed.data[dead] = x[torch.randint(len(x), (int(dead.sum()),))]
        self.size.data[dead] = 1.0

    def forward(self, x: Tensor) -> Tensor:
        if not self.initted:
            self.embed.data.copy_(x[torch.randint(len(x), (6,))].detach())
            self.initted.data.copy_(torch.tensor(True))
        codes = torch.cdist(x, self.embed).argmin(1)
        if self.training:
            self.update(x.detach(), codes)
        return x + (self.embed[codes] - x).detach()


class VqVae(Net):
    def __init__(self) -> None:
        super().__init__()
        self.code = Codebook()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        coded = self.code(batch[0])
        self.log("dead", float(self.code.dead))
        return super().training_step((coded, batch[1]), batch_idx)


class Diffusion(Net):
    """Noise of many strengths, the same noise in each validation, and an average that warms up."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Linear(8, 4))
        self.ema, self.ema_step = copy.deepcopy(self.net).requires_grad_(False), 0
        self.register_buffer("alphas", torch.linspace(0.99, 0.1, 10), persistent=False)
        self.val_generator = torch.Generator()

    def noised(self, x: Tensor, generator: Any) -> Any:
        t = torch.randint(10, (len(x), 1), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        a = self.alphas[t]
        return torch.cat([a.sqrt() * x + (1 - a).sqrt() * noise, t / 10], 1), noise

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, noise = self.noised(batch[0], None)
        loss = mse(self.net(x), noise)
        self.log("train/loss", loss)
        return loss

    def on_before_zero_grad(self, optimizer: Any) -> None:
        self.ema_step += 1
        decay = min(0.99, (1 + self.ema_step) / (10 + self.ema_step))
        for p, q in zip(self.net.parameters(), self.ema.parameters(), strict=True):
            q.lerp_(p.detach(), 1 - decay)

    def on_validation_epoch_start(self) -> None:
        self.val_generator.manual_seed(0)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        x, noise = self.noised(batch[0], self.val_generator)
        self.log("val/loss", mse(self.ema(x), noise))


class ActNorm(nn.Module):
    """Set by the first batch that it sees; a Python flag says so."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.scale = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
        self.initialized = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialized:
            self.loc.data, self.scale.data = -x.mean(0).detach(), 1 / (x.std(0) + 0.1).detach()
            self.initialized = True
        return (x + self.loc) * self.scale


class Flow(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(ActNorm(), *self.net)


# -- adversaries ------------------------------------------------------------------------------------


class Gan(LightningModule):
    """As the example of Lightning's page: toggled, with noise that is kept to look at."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 4), nn.LeakyReLU(0.2), nn.Linear(4, 4))
        self.discriminator = nn.Linear(4, 1)
        self.validation_z = torch.randn(8, 3)
        self.example_input_array = torch.zeros(2, 3)
        self.images: list[Tensor] = []

    def forward(self, z: Tensor) -> Tensor:
        return self.generator(z)

    def adversarial(self, y_hat: Tensor, value: float) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(y_hat, torch.full_like(y_hat, value))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(len(batch[0]), 3)
        self.toggle_optimizer(optimizer_g)
        self.generated = self(z)
        g_loss = self.adversarial(self.discriminator(self(z)), 1.0)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)
        self.toggle_optimizer(optimizer_d)
        fake = self.adversarial(self.discriminator(self(z).detach()), 0.0)
        d_loss = (self.adversarial(self.discriminator(batch[0]), 1.0) + fake) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    def on_validation_epoch_end(self) -> None:
        self.images.append(self(self.validation_z).detach())
        self.log("spread", self.images[-1].std() + len(self.images))

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.02, betas=(0.5, 0.999)),
            torch.optim.Adam(self.discriminator.parameters(), lr=0.02, betas=(0.5, 0.999)),
        ], []


class Wasserstein(Gan):
    """Five critics' steps for one of the generator, a penalty, schedules at the epochs' ends."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer_g, optimizer_d = self.optimizers()
        fake = self(torch.randn(len(batch[0]), 3))
        optimizer_d.zero_grad()
        share = torch.rand(len(batch[0]), 1)
        mixed = (share * batch[0] + (1 - share) * fake).detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.discriminator(mixed).sum(), mixed, create_graph=True)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        critic = self.discriminator(fake.detach()).mean() - self.discriminator(batch[0]).mean()
        self.manual_backward(critic + 10 * penalty)
        optimizer_d.step()
        for p in self.discriminator.parameters():
            p.data.clamp_(-0.5, 0.5)
        if (batch_idx + 1) % 5 == 0:
            optimizer_g.zero_grad()
            self.manual_backward(-self.discriminator(self(torch.randn(4, 3))).mean())
            optimizer_g.step()
        self.log("critic", critic.detach(), on_epoch=True)

    def on_train_epoch_end(self) -> None:
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def configure_optimizers(self) -> Any:
        optimizers, _ = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.ExponentialLR(one, 0.8) for one in optimizers]


class ImagePool:
    """Fakes of the past, half of the time."""

    def __init__(self) -> None:
        self.images: list[Tensor] = []

    def query(self, images: Tensor) -> Tensor:
        out = []
        for image in images.detach():
            if len(self.images) < 6:
                self.images.append(image)
                out.append(image)
            elif random.uniform(0, 1) > 0.5:
                place = random.randint(0, 5)
                out.append(self.images[place].clone())
                self.images[place] = image
            else:
                out.append(image)
        return torch.stack(out)


class Cycle(Gan):
    def __init__(self) -> None:
        super().__init__()
        self.pool = ImagePool()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer_g, optimizer_d = self.optimizers()
        fake = self(batch[0][:, :3])
        self._step(
            optimizer_g, self.adversarial(self.discriminator(fake), 1.0) + mse(fake, batch[0])
        )
        d_loss = self.adversarial(self.discriminator(self.pool.query(fake)), 0.0)
        self._step(optimizer_d, d_loss + self.adversarial(self.discriminator(batch[0]), 1.0))
        self.log_dict({"d": d_loss, "pool": float(len(self.pool.images))})
        for scheduler in self.lr_schedulers():
            scheduler.step()

    _step = Sac._step

    def configure_optimizers(self) -> Any:
        optimizers, _ = super().configure_optimizers()
        decay = [
            torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1.0 - max(0, step - 5) / 30)
            for one in optimizers
        ]
        return optimizers, decay


# -- self-supervision ---------------------------------------------------------------------------------


class Swav(Net):
    """A queue from the second epoch on, prototypes that stay in the first."""

    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Linear(8, 3, bias=False)
        self.queue: Any = None
        self.use_the_queue = False

    def on_train_epoch_start(self) -> None:
        if self.current_epoch >= 1 and self.queue is None:
            self.queue = torch.zeros(2, 6, 8)
        self.use_the_queue = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            w = self.prototypes.weight.data.clone()
            self.prototypes.weight.copy_(nn.functional.normalize(w, dim=1))
        embedding = self.net[0](batch[0])
        loss = super().training_step(batch, batch_idx) + self.prototypes(embedding).square().mean()
        if self.queue is not None:
            if self.use_the_queue or not torch.all(self.queue[0, -1] == 0):
                self.use_the_queue = True
                loss = loss + self.prototypes(self.queue[0].clone()).mean()
            self.queue[0, 4:] = self.queue[0, :-4].clone()
            self.queue[0, :4] = embedding.detach()
        return loss

    def on_after_backward(self) -> None:
        if self.current_epoch < 1:
            self.prototypes.weight.grad = None


class Byol(Net):
    def __init__(self) -> None:
        super().__init__()
        self.online_network, self.target_network = self.net, copy.deepcopy(self.net)
        self.predictor = nn.Linear(1, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        one, two = (batch[0] + 0.1 * torch.randn_like(batch[0]) for _ in range(2))
        with torch.no_grad():
            goal = self.target_network(two)
        return super().training_step(batch, batch_idx) + mse(self.predictor(self.net(one)), goal)


class ByolUpdate(Callback):
    def __init__(self, initial_tau: float = 0.8) -> None:
        self.initial_tau = self.current_tau = initial_tau

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        for p, q in zip(
            module.online_network.parameters(), module.target_network.parameters(), strict=True
        ):
            q.data = self.current_tau * q.data + (1 - self.current_tau) * p.data
        cosine = math.cos(math.pi * trainer.global_step / 30) + 1
        self.current_tau = 1 - (1 - self.initial_tau) * cosine / 2


class OnlineEvaluator(Callback):
    """A head of its own with an optimizer of its own, which no state_dict of the model has."""

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self.recovered: Any = None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.head = nn.Linear(4, 1)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=0.01)
        if self.recovered is not None:
            self.head.load_state_dict(self.recovered["head"])
            self.optimizer.load_state_dict(self.recovered["optimizer"])

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = mse(self.head(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        module.log("online/train_loss", loss, on_step=True, on_epoch=False)

    def on_validation_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, *args: Any
    ) -> None:
        module.log(
            "online/val_loss", mse(self.head(batch[0]), batch[1]), on_step=False, on_epoch=True
        )

    def state_dict(self) -> dict[str, Any]:
        if not self.keeps:
            return {}
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recovered = state


class Dino(Net):
    """Schedules in arrays, by the step; the teacher's centre."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.center = torch.zeros(1, 1)
        self.wd_schedule = np.linspace(0.04, 0.4, 30)
        self.lr_schedule = np.concatenate([np.linspace(0, 0.05, 5), np.linspace(0.05, 0.0, 25)])

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        for group in self.optimizers().param_groups:
            group["lr"] = self.lr_schedule[self.global_step]
            group["weight_decay"] = self.wd_schedule[self.global_step]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            out = self.teacher(batch[0])
            goal = (out - self.center).tanh()
            self.center = self.center * 0.9 + out.mean(0, keepdim=True) * 0.1
        return super().training_step(batch, batch_idx) + mse(self(batch[0]).tanh(), goal)

    def on_train_batch_end(self, *args: Any) -> None:
        m = 1 - 0.1 * (math.cos(math.pi * self.global_step / 30) + 1) / 2
        for p, q in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
            q.data.mul_(m).add_((1 - m) * p.detach().data)


class Simsiam(Net):
    """torch's own average of weights, with its multi_avg_fn, buffers too."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.ema = swa_utils.AveragedModel(
            self.net, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.8), use_buffers=True
        )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.ema.update_parameters(self.net)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val/loss", mse(self.ema(batch[0]), batch[1]))


# -- optimizers and losses with a memory ------------------------------------------------------------


class OldRadam(torch.optim.Optimizer):
    """With the table of its first version, which no state_dict has."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})
        self.buffer: list[list[Any]] = [[None, None] for _ in range(10)]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"], state["avg"] = 0, torch.zeros_like(p)
                state["step"] += 1
                state["avg"].mul_(0.9).add_(p.grad, alpha=0.1)
                buffered = self.buffer[state["step"] % 10]
                if buffered[0] != state["step"]:
                    buffered[0], buffered[1] = state["step"], 1 / (1 - 0.9 ** state["step"])
                p.add_(state["avg"], alpha=-group["lr"] * buffered[1])
        return loss


class Sam(torch.optim.Optimizer):
    """Two steps for one, around an optimizer that it makes itself."""

    def __init__(self, params: Any, base: Any, **kwargs: Any) -> None:
        super().__init__(params, {"rho": 0.05, **kwargs})
        self.base_optimizer = base(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old_p"] = p.data.clone()
                p.add_(p.grad * group["rho"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        return loss


class Lookahead:
    """Not an optimizer by its class: patches one that it is given."""

    def __init__(self, optimizer: Any, k: int = 4) -> None:
        self.k, self.count = k, 0
        self.slow = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
        optimizer.register_step_post_hook(self.after)

    @torch.no_grad()
    def after(self, optimizer: Any, *args: Any) -> None:
        self.count += 1
        if self.count % self.k:
            return
        fast = [p for g in optimizer.param_groups for p in g["params"]]
        for p, q in zip(fast, self.slow, strict=True):
            q.add_(p - q, alpha=0.5)
            p.copy_(q)


class Optimized(Net):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def looking_ahead(params: Any) -> Any:
    optimizer = torch.optim.SGD(params, lr=0.05)
    Lookahead(optimizer)
    return optimizer


class Grokfast(Net):
    """Gradients with their own average, by a function that hands it round."""

    def __init__(self, window: bool) -> None:
        super().__init__()
        self.window, self.grads = window, None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        new = {n: p.grad.data.detach() for n, p in self.named_parameters()}
        if self.window:
            if self.grads is None:
                self.grads = {n: deque(maxlen=5) for n in new}
            for n, p in self.named_parameters():
                self.grads[n].append(new[n])
                p.grad.data = p.grad.data + sum(self.grads[n]) / 5
            return
        if self.grads is None:
            self.grads = new
        for n, p in self.named_parameters():
            self.grads[n] = self.grads[n] * 0.9 + p.grad.data.detach() * 0.1
            p.grad.data = p.grad.data + self.grads[n] * 2


class GradNorm(Net):
    """Weights of two losses, from how they began."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_weights = [1.0, 1.0]
        self.initial_losses: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = [self.loss(batch), self(batch[0]).abs().mean()]
        if self.initial_losses is None:
            self.initial_losses = [loss.item() for loss in losses]
        ratios = [
            loss.item() / first for loss, first in zip(losses, self.initial_losses, strict=True)
        ]
        self.loss_weights = [2 * ratio / sum(ratios) for ratio in ratios]
        return sum(w * loss for w, loss in zip(self.loss_weights, losses, strict=True))


class GradientSurgery(Manual):
    """Projects tasks' gradients in an order that is drawn."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        losses = [self.loss(batch), self(batch[0]).abs().mean()]
        parameters = [*self.net.parameters()]
        grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
        flat = [torch.cat([g.flatten() for g in grad]) for grad in grads]
        random.shuffle(flat)
        if flat[0] @ flat[1] < 0:
            flat[0] = flat[0] - (flat[0] @ flat[1]) / flat[1].square().sum() * flat[1]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        place, total = 0, flat[0] + flat[1]
        for p in parameters:
            p.grad = total[place : place + p.numel()].view_as(p)
            place += p.numel()
        optimizer.step()
        self.log("train/loss", losses[0].detach())


class FreeAdversary(Net):
    """A perturbation that is trained along, a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.delta = torch.zeros(BATCH, 4, requires_grad=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((batch[0] + self.delta[: len(batch[0])], batch[1]), batch_idx)

    def on_after_backward(self) -> None:
        with torch.no_grad():
            self.delta.add_(0.05 * self.delta.grad.sign()).clamp_(-0.2, 0.2)
        self.delta.grad.zero_()


class Prompts(Net):
    """Plain tensors that are leaves, in a list, given to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.prompts = [torch.randn(4, requires_grad=True) for _ in range(3)]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        prompt = self.prompts[batch_idx % 3]
        return super().training_step((batch[0] * (1 + prompt), batch[1]), batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([*self.net.parameters(), *self.prompts], lr=0.05)


class CenterLoss(nn.Module):
    """Centres with a rate of their own, in a loss that is no part of the model's weights."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = torch.zeros(2, 8)
        self.counts: Counter[int] = Counter()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        for label in labels.unique().tolist():
            self.counts[label] += 1
            mean = x[labels == label].mean(0).detach()
            self.centers[label] += (mean - self.centers[label]) / self.counts[label]
        return (x - self.centers[labels]).square().mean()


class Centered(Net):
    def __init__(self) -> None:
        super().__init__()
        self.center_loss = CenterLoss()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        labels = (batch[1].flatten() > 2).long()
        return super().training_step(batch, batch_idx) + self.center_loss(
            self.net[0](batch[0]), labels
        )


class Step:
    """What LambdaLR calls: an object that counts."""

    def __init__(self) -> None:
        self.calls, self.best = 0, None

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return 1.0 / (1 + 0.1 * self.calls)


class CountingLambda(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, Step())
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class TimmScheduler:
    """A schedule of another library: stepped with the epoch, and by updates."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.metric, self.noise = optimizer, None, np.random.RandomState(4)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("optimizer", "noise")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def step(self, epoch: int, metric: Any = None) -> None:
        self.metric = metric
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * 0.9**epoch * (1 + 0.1 * self.noise.uniform())

    def step_update(self, num_updates: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.99


class Timm(Net):
    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [{"scheduler": TimmScheduler(optimizer), "interval": "epoch"}]

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step(epoch=self.current_epoch, metric=metric)

    def on_train_batch_end(self, *args: Any) -> None:
        self.lr_schedulers().step_update(self.global_step)


class SchedulerAside(Net):
    """A schedule that Lightning is not told of."""

    def configure_optimizers(self) -> Any:
        self.opt = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        self.sched = torch.optim.lr_scheduler.CosineAnnealingLR(self.opt, 30)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(self.opt, patience=0)
        return self.opt

    def on_train_batch_end(self, *args: Any) -> None:
        self.sched.step()

    def on_validation_epoch_end(self) -> None:
        self.plateau.step(self.trainer.callback_metrics["val/loss"])


class Transformers(Net):
    """Two groups, a warm-up by the steps that are to come, outputs in lists that are emptied."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.outputs: dict[int, list[Any]] = defaultdict(list)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        loss = self.loss(batch)
        self.outputs[dataloader_idx].append({"loss": loss, "preds": self(batch[0])})

    def on_validation_epoch_end(self) -> None:
        flat = [one for outputs in self.outputs.values() for one in outputs]
        self.log("val/loss", torch.stack([one["loss"] for one in flat]).mean())
        self.log("val/std", torch.cat([one["preds"] for one in flat]).std())
        self.outputs.clear()

    def configure_optimizers(self) -> Any:
        decays = [p for n, p in self.named_parameters() if "bias" not in n]
        rest = [p for n, p in self.named_parameters() if "bias" in n]
        groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        total = self.trainer.estimated_stepping_batches

        def rate(step: int) -> float:
            return step / 5 if step < 5 else max(0.0, (total - step) / (total - 5))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return [optimizer], [{"scheduler": schedule, "interval": "step", "frequency": 1}]


class SkipsSpikes(Net):
    """Leaves out batches whose loss is far above what is usual, and gives up after many."""

    def __init__(self) -> None:
        super().__init__()
        self.average: Any = None
        self.skipped = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        value = loss.item()
        if self.average is not None and value > 1.3 * self.average:
            self.skipped += 1
            self.average = 0.9 * self.average + 0.1 * value
            return None
        self.average = value if self.average is None else 0.9 * self.average + 0.1 * value
        return loss


class ClipsByHistory(Net):
    """Clips at a percentile of the gradients' norms so far."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        norm = grad_norm(self, norm_type=2)["grad_2.0_norm_total"]
        self.norms.append(float(norm))
        limit = float(np.percentile(self.norms, 30))
        self.clip_gradients(optimizer, limit, "norm")
        self.log("clip", limit)


# -- state of odd places ------------------------------------------------------------------------------


class Hidden(NamedTuple):
    h: Tensor
    c: Tensor
    step: int


@dataclasses.dataclass(frozen=True)
class Progress:
    seen: int = 0
    best: float = math.inf
    history: tuple[float, ...] = ()


class Replaced(Net):
    """States that are replaced as a whole: a named tuple, a frozen record."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = Hidden(torch.zeros(4), torch.zeros(4), 0)
        self.state = Progress()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].mean(0)
        self.hidden = Hidden(0.9 * self.hidden.h + x, self.hidden.c + 1, self.hidden.step + 1)
        loss = super().training_step((batch[0] + self.hidden.h / 10, batch[1]), batch_idx)
        value = loss.item()
        self.state = dataclasses.replace(
            self.state,
            seen=self.state.seen + len(batch[0]),
            best=min(self.state.best, value),
            history=(*self.state.history[-3:], value),
        )
        return loss * (1 + self.state.best) * (1 + self.state.seen / 100)


class AverageMeter:
    def __init__(self, name: str, fmt: str = ":f") -> None:
        self.name, self.fmt = name, fmt
        self.reset()

    def reset(self) -> None:
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val: float, n: int = 1) -> None:
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


class Metered(Net):
    """The meters of the ImageNet example, with clocks."""

    def __init__(self) -> None:
        super().__init__()
        self.meters = {n: AverageMeter(n) for n in ("loss", "time")}
        self.end = time.time()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.meters["loss"].update(loss.item(), len(batch[0]))
        self.meters["time"].update(time.time() - self.end)
        self.end = time.time()
        self.logger.log_metrics({"clock/time": self.meters["time"].avg}, step=self.global_step)
        self.log("avg", self.meters["loss"].avg)
        return loss * (1 + self.meters["loss"].avg)


class Hooked(Net):
    """Activations that a hook keeps, overwritten by each forward."""

    def __init__(self, detach: bool) -> None:
        super().__init__()
        self.activations: dict[str, Tensor] = {}
        self.net[1].register_forward_hook(self.keep("relu", detach))

    def keep(self, name: str, detach: bool) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            self.activations[name] = output.detach() if detach else output

        return hook

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss + self.activations["relu"].abs().mean() * 0.1


class LastLoss(Net):
    """The newest loss with its history, and the outputs of a whole epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None
        self.outputs: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        before = 1.0 if self.last is None else self.last.item()
        self.last = super().training_step(batch, batch_idx)
        self.outputs.append(self.last)
        return self.last * (1 + 0.1 * before)

    def on_train_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.outputs).mean())
        self.outputs.clear()


class GoesBack(Manual):
    """Two steps for one forward: the history is still needed."""

    kept: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % 2 == 0:
            self.kept = self.net[0](batch[0]).square().mean()
            return
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = self.loss(batch)
        self.manual_backward(loss if self.kept is None else loss + self.kept)
        optimizer.step()
        self.kept = None


class LastBatch(Net):
    """Keeps the newest batch and its output, to show them at an epoch's end."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        y = self(batch[0])
        loss = mse(y, batch[1])
        self.last = {"batch": batch, "y": y.detach(), "loss": loss.item()}
        return loss

    def on_train_epoch_end(self) -> None:
        self.log("last", self.last["loss"] + self.last["y"].mean())


class Inner(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) / self.calls


class Nested(Net):
    """A LightningModule inside another."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((self.inner(batch[0]), batch[1]), batch_idx)


class OwnDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(5)
        self.p = 0.5

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(x.shape, generator=self.generator) > self.p
        return x * kept / (1 - self.p)


class OwnDropouts(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, OwnDropout())

    def on_train_epoch_start(self) -> None:
        self.net[1].p = 0.5 / (1 + self.current_epoch)


class StochasticDepth(Net):
    """Layers that are left out by Python's generator; rates that rise by steps."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict({f"b{i}": nn.Linear(4, 4) for i in range(3)})
        self.rates = dict.fromkeys(self.blocks, 0.0)
        self.used: Counter[str] = Counter()

    def forward(self, x: Tensor) -> Tensor:
        for name, block in self.blocks.items():
            if not self.training or random.random() >= self.rates[name]:
                x = x + block(x) / (1 + self.used[name] / 10)
                self.used[name] += self.training
        return self.net(x)

    def on_train_batch_end(self, *args: Any) -> None:
        for i, name in enumerate(self.rates):
            self.rates[name] = min(0.2 * i, self.rates[name] + 0.02)


class Annealed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.beta = nn.Parameter(torch.tensor(1.0), requires_grad=False), 0.0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hard = nn.functional.gumbel_softmax(self.net[0](batch[0]), tau=float(self.temperature))
        return super().training_step(batch, batch_idx) + self.beta * hard.square().mean()

    def on_train_batch_end(self, *args: Any) -> None:
        self.temperature.data = torch.clamp(self.temperature * 0.97, min=0.5)
        self.beta = (self.global_step % 8) / 8


class Orthogonal(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net[0] = parametrizations.weight_norm(nn.Linear(4, 8))
        self.other = parametrizations.orthogonal(nn.Linear(4, 4))
        self.spectral = parametrizations.spectral_norm(nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.spectral(self.other(x)))


class CachedParametrization(Orthogonal):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with parametrize.cached():
            return super().training_step(batch, batch_idx) + self(batch[0]).mean()


class PruneByHand(Net):
    """Pruned in the second epoch, for good: the mask is not kept, the zeros are."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            prune.l1_unstructured(self.net[0], "weight", 0.3)
            prune.remove(self.net[0], "weight")


class MaskedByHand(Net):
    """A lottery ticket: masks by name, rewinding to the first weights."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[str, Tensor] = {}
        self.first = copy.deepcopy(self.net.state_dict())

    def on_train_epoch_end(self) -> None:
        weights = self.net.state_dict()
        for name, w in weights.items():
            if name.endswith("weight"):
                self.masks[name] = w.abs() > w.abs().quantile(0.3)
        self.net.load_state_dict(self.first)

    def on_train_batch_end(self, *args: Any) -> None:
        for name, p in self.net.named_parameters():
            if name in self.masks:
                p.data *= self.masks[name]


class Rewound(Net):
    """Goes back to the best weights when it has become worse, as the tutorials do."""

    def __init__(self) -> None:
        super().__init__()
        self.best, self.best_state, self.bad = math.inf, None, 0

    def on_validation_epoch_end(self) -> None:
        value = float(self.trainer.callback_metrics["val/loss"])
        if value < self.best:
            self.best, self.best_state, self.bad = value, copy.deepcopy(self.state_dict()), 0
        else:
            self.bad += 1
            if self.best_state is not None:
                self.load_state_dict(self.best_state)
                for group in self.optimizers().param_groups:
                    group["lr"] *= 0.5


class Swag(Callback):
    """First and second moments of the weights, and the deviations of late."""

    def __init__(self) -> None:
        self.mean: Any = None
        self.sq_mean: Any = None
        self.deviations: list[Tensor] = []
        self.n = 0

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, i: int
    ) -> None:
        if i % 3:
            return
        w = nn.utils.parameters_to_vector(module.parameters()).detach()
        if self.mean is None:
            self.mean, self.sq_mean = torch.zeros_like(w), torch.zeros_like(w)
        self.mean = (self.mean * self.n + w) / (self.n + 1)
        self.sq_mean = (self.sq_mean * self.n + w**2) / (self.n + 1)
        self.deviations = [*self.deviations, w - self.mean][-4:]
        self.n += 1

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if self.n:
            self.kept = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
            scale = (self.sq_mean - self.mean**2).clamp(min=0).sqrt()
            drawn = self.mean + scale * torch.randn_like(scale)
            nn.utils.vector_to_parameters(drawn, module.parameters())

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if self.n:
            nn.utils.vector_to_parameters(self.kept, module.parameters())


class Population(Callback):
    """Rates that are shaken at each epoch's end."""

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        for group in trainer.optimizers[0].param_groups:
            group["lr"] *= random.choice([0.5, 0.8, 1.25])


class Reseeds(Callback):
    """Fixed noise in validations, as some do it."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if self.how == "seed":
            torch.manual_seed(123)
            np.random.seed(123)
        elif self.how == "isolated":
            with isolate_rng():
                torch.manual_seed(0)
                module.probe = torch.randn(3)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                module.probe = torch.randn(3)


class Noisy(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0] + 0.1 * torch.randn_like(batch[0]) + 0.1 * np.random.randn() * random.random()
        return super().training_step((x, batch[1]), batch_idx)


class SeedsSteps(Noisy):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        torch.manual_seed(self.global_step)
        return super().training_step(batch, batch_idx)


class PrintTable(Callback):
    """Rows of metrics, as it is done to be printed."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.metrics.append({k: v.item() for k, v in trainer.callback_metrics.items()})
        trainer.logger.log_metrics({"rows": len(self.metrics)}, step=trainer.global_step)


class EmaModel(Callback):
    """The average of timm, as a deep copy, which stands in for the model in validations."""

    def __init__(self, decay: float = 0.8) -> None:
        self.decay, self.ema, self.original = decay, None, None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        if self.ema is None:
            self.ema = copy.deepcopy(module.net).eval()

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        with torch.no_grad():
            for q, p in zip(
                self.ema.state_dict().values(), module.net.state_dict().values(), strict=True
            ):
                q.copy_(self.decay * q + (1 - self.decay) * p)

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        self.original, module.net = module.net, self.ema

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        module.net = self.original


class WithCallbacks(Net):
    """Callbacks that the module brings along."""

    def configure_callbacks(self) -> Any:
        return [EarlyStopping("val/loss", patience=1, min_delta=0.01), PrintTable()]


class Clones(Net):
    """Metrics of many kinds in one collection, cloned for each loader; sums of metrics."""

    def __init__(self) -> None:
        super().__init__()
        metrics = tm.MetricCollection(
            {"mae": tm.MeanAbsoluteError(), "mse": tm.MeanSquaredError(), "r2": tm.R2Score()}
        )
        self.train_metrics = metrics.clone(prefix="train_")
        self.val_metrics = nn.ModuleList([metrics.clone(prefix="val_")])
        self.both = tm.MeanAbsoluteError() + tm.MeanSquaredError()
        self.rank = tm.SpearmanCorrCoef(compute_on_cpu=True)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        y = self(batch[0]).detach()
        self.log_dict(self.train_metrics(y, batch[1]), on_step=True)
        self.both.update(y, batch[1])
        self.rank.update(y.flatten(), batch[1].flatten())
        return loss * (1 + self.both.compute().detach())

    def on_train_epoch_end(self) -> None:
        self.log("rank", self.rank.compute())
        self.rank.reset()
        self.log("both", self.both.compute())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.val_metrics[dataloader_idx].update(self(batch[0]), batch[1])

    def on_validation_epoch_end(self) -> None:
        for metrics in self.val_metrics:
            self.log_dict(metrics.compute())
            metrics.reset()


class FunctionLoss(Net):
    """A loss with a memory: class frequencies and a schedule inside a module without weights."""

    _shared: ClassVar[Any] = OrderedDict()

    def __init__(self) -> None:
        super().__init__()
        self.criterion = Balanced()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.criterion(self(batch[0]), batch[1])


class Balanced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.freq = torch.ones(2)
        self.gamma, self.iteration = 2.0, 0

    def forward(self, y: Tensor, goal: Tensor) -> Tensor:
        label = (goal > 2).long().flatten()
        self.freq = 0.9 * self.freq + 0.1 * torch.bincount(label, minlength=2)
        self.iteration += 1
        self.gamma = max(0.5, 2.0 - 0.05 * self.iteration)
        error = (y - goal).abs().flatten()
        return (error**self.gamma / self.freq[label]).mean()


class Pseudo(Net):
    """Outputs of the epoch before are this one's targets, sample by sample."""

    def __init__(self) -> None:
        super().__init__()
        self.targets = torch.zeros(TRAIN, 1)
        self.certain: set[int] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y, index = batch
        out = self(x)
        loss = mse(out, y) + mse(out, self.targets[index])
        with torch.no_grad():
            self.targets[index] = 0.5 * self.targets[index] + 0.5 * out
        self.certain |= set(index[(out - y).abs().flatten() < 0.5].tolist())
        self.log("certain", float(len(self.certain)))
        return loss * (1 + len(self.certain) / 100)


class Indexed(Samples):
    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index], index


def indexed() -> Any:
    return resumable(DataLoader(Indexed(), BATCH, shuffle=True))


def best_beside() -> list[Callback]:
    return [
        ModelCheckpoint(monitor="val/loss", save_top_k=2, save_last=True, every_n_train_steps=None),
        EarlyStopping("val/loss", patience=2),
    ]


SHAPES = {
    "sac": Shape(Sac),
    "sac_interval": Shape(Sac, trainer=INTERVAL),
    "actor_critic": Shape(ActorCritic, data=dict),
    "prioritized_tree": Shape(Prioritized),
    "vq_vae": Shape(VqVae),
    "diffusion": Shape(Diffusion),
    "diffusion_interval": Shape(Diffusion, trainer=INTERVAL),
    "act_norm": Shape(Flow),
    "gan_page": Shape(Gan),
    "gan_page_interval": Shape(Gan, trainer=INTERVAL),
    "wasserstein": Shape(Wasserstein),
    "cycle_pool": Shape(Cycle),
    "swav": Shape(Swav),
    "byol": Shape(Byol, callbacks=lambda: [ByolUpdate()]),
    "online_evaluator": Shape(Net, callbacks=lambda: [OnlineEvaluator(False)]),
    "online_evaluator_kept": Shape(Net, callbacks=lambda: [OnlineEvaluator(True)]),
    "dino": Shape(Dino),
    "averaged_model": Shape(Simsiam),
    "averaged_model_accumulate": Shape(Simsiam, trainer={"accumulate_grad_batches": 3}),
    "old_radam": Shape(lambda: Optimized(OldRadam)),
    "sam": Shape(lambda: Optimized(lambda p: Sam(p, torch.optim.SGD, lr=0.05, momentum=0.9))),
    "lookahead_hook": Shape(lambda: Optimized(looking_ahead)),
    "grokfast": Shape(lambda: Grokfast(False)),
    "grokfast_window": Shape(lambda: Grokfast(True)),
    "grad_norm": Shape(GradNorm),
    "gradient_surgery": Shape(GradientSurgery),
    "free_adversary": Shape(FreeAdversary),
    "prompts": Shape(Prompts),
    "center_loss": Shape(Centered),
    "counting_lambda": Shape(CountingLambda),
    "timm_schedule": Shape(Timm),
    "schedule_aside": Shape(SchedulerAside),
    "transformers": Shape(Transformers),
    "transformers_sanity": Shape(Transformers, trainer={"num_sanity_val_steps": -1, **INTERVAL}),
    "skips_spikes": Shape(SkipsSpikes),
    "clips_by_history": Shape(ClipsByHistory),
    "replaced_records": Shape(Replaced),
    "meters": Shape(Metered, clocks=("clock/",)),
    "hooked": Shape(lambda: Hooked(True)),
    "hooked_with_history": Shape(lambda: Hooked(False)),
    "last_loss": Shape(LastLoss),
    "last_loss_interval": Shape(LastLoss, trainer=INTERVAL),
    "goes_back": Shape(GoesBack),
    "last_batch": Shape(LastBatch),
    "nested_module": Shape(Nested),
    "own_dropout": Shape(OwnDropouts),
    "stochastic_depth": Shape(StochasticDepth),
    "annealed": Shape(Annealed),
    "parametrized": Shape(Orthogonal),
    "parametrized_cached": Shape(CachedParametrization),
    "pruned_by_hand": Shape(PruneByHand),
    "lottery_by_hand": Shape(MaskedByHand),
    "rewound": Shape(Rewound, trainer=INTERVAL),
    "swag": Shape(Net, callbacks=lambda: [Swag()], trainer=INTERVAL),
    "population": Shape(Net, callbacks=lambda: [Population()]),
    "reseeds": Shape(Noisy, callbacks=lambda: [Reseeds("seed")], trainer=INTERVAL),
    "reseeds_isolated": Shape(Noisy, callbacks=lambda: [Reseeds("isolated")]),
    "reseeds_forked": Shape(Noisy, callbacks=lambda: [Reseeds("forked")]),
    "seeds_steps": Shape(SeedsSteps),
    "prints_table": Shape(Net, callbacks=lambda: [PrintTable()]),
    "ema_swapped_in": Shape(Net, callbacks=lambda: [EmaModel()]),
    "ema_swapped_in_interval": Shape(Net, callbacks=lambda: [EmaModel()], trainer=INTERVAL),
    "configured_callbacks": Shape(WithCallbacks),
    "cloned_metrics": Shape(Clones),
    "balanced_loss": Shape(FunctionLoss),
    "pseudo_targets": Shape(Pseudo, data=data(indexed)),
    "best_beside": Shape(Noisy, callbacks=best_beside, trainer=INTERVAL),
    "ema_averaging_plateau": Shape(
        SchedulerAside, callbacks=lambda: [EMAWeightAveraging(decay=0.8)], trainer=INTERVAL
    ),
}

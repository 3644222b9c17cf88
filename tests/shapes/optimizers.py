"""Every optimizer of torch that steps dense parameters on a CPU, groups, and own steps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

from shapes.base import Net, Shape


class Optimized(Net):
    def __init__(self, make: Callable[[Any], optim.Optimizer]) -> None:
        super().__init__()
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self)


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "asgd": lambda m: optim.ASGD(m.parameters(), lr=0.05, t0=5),
    "adadelta": lambda m: optim.Adadelta(m.parameters(), lr=1.0),
    "adafactor": lambda m: optim.Adafactor(m.parameters(), lr=0.05),
    "adagrad": lambda m: optim.Adagrad(m.parameters(), lr=0.1),
    "adam_amsgrad": lambda m: optim.Adam(m.parameters(), lr=0.05, amsgrad=True),
    "adam_foreach": lambda m: optim.Adam(m.parameters(), lr=0.05, foreach=True),
    "adam_fused": lambda m: optim.Adam(m.parameters(), lr=0.05, fused=True),
    "adam_capturable_rate": lambda m: optim.Adam(m.parameters(), lr=torch.tensor(0.05)),
    "adamw": lambda m: optim.AdamW(m.parameters(), lr=0.05, weight_decay=0.1),
    "adamax": lambda m: optim.Adamax(m.parameters(), lr=0.05),
    "lbfgs": lambda m: optim.LBFGS(m.parameters(), lr=0.1, max_iter=3, history_size=4),
    "lbfgs_wolfe": lambda m: optim.LBFGS(m.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
    "muon": lambda m: optim.Muon([m.net[0].weight, m.net[2].weight], lr=0.05),
    "nadam": lambda m: optim.NAdam(m.parameters(), lr=0.05),
    "radam": lambda m: optim.RAdam(m.parameters(), lr=0.05),
    "rmsprop": lambda m: optim.RMSprop(m.parameters(), lr=0.01, momentum=0.5, centered=True),
    "rprop": lambda m: optim.Rprop(m.parameters(), lr=0.01),
    "sgd": lambda m: optim.SGD(m.parameters(), lr=0.05),
    "sgd_nesterov": lambda m: optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "groups": lambda m: optim.AdamW(
        [{"params": m.net[0].parameters(), "lr": 0.1}, {"params": m.net[2].parameters()}],
        lr=0.01,
    ),
    "groups_one_frozen": lambda m: optim.SGD(
        [{"params": m.net[0].parameters(), "lr": 0.0}, {"params": m.net[2].parameters()}],
        lr=0.05,
        momentum=0.9,
    ),
}


class Sparse(Net):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 1, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[:, 0] * 8).long()) + self.net(x).detach()

    def configure_optimizers(self) -> Any:
        return optim.SparseAdam(self.table.parameters(), lr=0.05)


class GrowingGroups(Net):
    """A second group joins in the second epoch, as when layers are unfrozen."""

    def configure_optimizers(self) -> Any:
        return optim.SGD(self.net[2].parameters(), lr=0.05, momentum=0.9)

    def on_train_epoch_start(self) -> None:
        optimizer = self.optimizers()
        if self.current_epoch == 1 and len(optimizer.param_groups) == 1:
            optimizer.add_param_group({"params": list(self.net[0].parameters()), "lr": 0.01})


class Counting(optim.SGD):
    """Every fourth step goes half the way from slow weights, and counts: nothing of that is in its
    state_dict.
    """

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.steps = 0
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = super().step(closure)
        self.steps += 1
        fast = [p for group in self.param_groups for p in group["params"]]
        for slow, parameter in zip(self.slow, fast, strict=True) if self.steps % 4 == 0 else ():
            slow.add_(parameter.detach() - slow, alpha=0.5)
            parameter.data.copy_(slow)
        return loss


class Stateless:
    """A schedule that is no class of torch, and whose state_dict is empty."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.steps = optimizer, 0

    def step(self, *args: Any) -> None:
        self.steps += 1
        self.optimizer.param_groups[0]["lr"] = 0.1 / (1 + self.steps)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class OwnOptimizer(Net):
    def configure_optimizers(self) -> Any:
        optimizer = Counting(self.parameters(), lr=0.1)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": Stateless(optimizer), "interval": "step"},
        }

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class Wraps(optim.Optimizer):
    """Shares its groups with the one that it wraps, as SAM and Lookahead do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})
        self.inner = optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        return self.inner.step(closure)


class Wrapped(Net):
    def configure_optimizers(self) -> Any:
        optimizer = Wraps(self.parameters(), lr=0.05)
        schedule = optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Replaces(Net):
    """In the second epoch: the optimizer, its schedule, or the layer that it trains."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def configure_optimizers(self) -> Any:
        optimizer = optim.Adam(self.parameters(), lr=0.05)
        return [optimizer], [optim.lr_scheduler.StepLR(optimizer, 1)]

    def on_train_epoch_start(self) -> None:
        if self.current_epoch != 1:
            return
        if self.what == "optimizer":
            self.trainer.optimizers = [optim.AdamW(self.parameters(), lr=0.01)]
        elif self.what == "schedule":
            schedule = optim.lr_scheduler.CosineAnnealingLR(self.trainer.optimizers[0], 4)
            self.trainer.lr_scheduler_configs[0].scheduler = schedule
        else:
            self.net[2] = nn.Linear(8, 1)


class ReadsGradients(Net):
    """Of the step before."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        before = self.net[0].weight.grad
        return super().training_step(batch, batch_idx) * (1 if before is None else before.norm())


class EverySecond(Net):
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Any = None,
    ) -> None:
        optimizer_closure()
        if batch_idx % 2:
            optimizer.step()


class Warmup(Net):
    """The rate is written into the optimizer by hand."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * min(1.0, (self.global_step + 1) / 15)
        optimizer.step(closure=closure)


class KeptGradients(Net):
    """Gradients are set to zero every third batch only."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 3 == 0:
            optimizer.zero_grad()


class GradientMomentum(Net):
    """Gradients are decayed, never cleared."""

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)


class OwnClipping(Net):
    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: Any,
        gradient_clip_algorithm: Any,
    ) -> None:
        value = 0.01 * (1 + self.current_epoch)
        self.clip_gradients(optimizer, gradient_clip_val=value, gradient_clip_algorithm="norm")


class ScaledRate(Net):
    """Halves the rate at each epoch's end, in a hook."""

    def on_train_epoch_end(self) -> None:
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] /= 2


class NoOptimizer(Net):
    """Weights are averages of what was seen: nothing is stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.mean.lerp_(batch[0].mean(0), 0.1)
        self.log("mean", self.mean.sum())
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return None


SHAPES = {name: Shape(model=lambda make=make: Optimized(make)) for name, make in OPTIMIZERS.items()}
SHAPES |= {
    "numpy_rate": Shape(
        model=lambda: Optimized(lambda m: optim.SGD(m.parameters(), lr=np.logspace(-3, -1, 5)[2]))
    ),
    "lbfgs_val_interval": Shape(
        model=lambda: Optimized(OPTIMIZERS["lbfgs"]),
        trainer={"val_check_interval": 4},
    ),
    "sparse_adam": Shape(model=Sparse),
    "own_classes": Shape(model=OwnOptimizer, extra=lambda m, t: t.optimizers[0].slow),
    "wrapped": Shape(model=Wrapped),
    "replaced_optimizer": Shape(model=lambda: Replaces("optimizer")),
    "replaced_schedule": Shape(model=lambda: Replaces("schedule")),
    "replaced_layer": Shape(model=lambda: Replaces("layer")),
    "reads_gradients": Shape(model=ReadsGradients),
    "growing_groups": Shape(model=GrowingGroups),
    "every_second": Shape(model=EverySecond),
    "warmup": Shape(model=Warmup),
    "kept_gradients": Shape(model=KeptGradients),
    "gradient_momentum": Shape(model=GradientMomentum),
    "gradient_momentum_val_interval": Shape(
        model=GradientMomentum,
        trainer={"val_check_interval": 3},
    ),
    "own_clipping": Shape(model=OwnClipping),
    "scaled_rate": Shape(model=ScaledRate),
    "no_optimizer": Shape(model=NoOptimizer),
}

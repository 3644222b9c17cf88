"""Manual optimization, adversarial trainings, and steps that return what Lightning allows."""

from typing import Any

import torch
from torch import Tensor, nn

from shapes.base import Manual, Net, Shape


class EveryFourth(Manual):
    """Accumulates by hand; `mode` says how the gradients are cleared."""

    def __init__(self, mode: str = "optimizer", every: int = 4) -> None:
        super().__init__()
        self.mode, self.every = mode, every

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        loss = self.loss(batch) / self.every
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            optimizer.step()
            if self.mode == "optimizer":
                optimizer.zero_grad()
            elif self.mode == "module":
                self.zero_grad()
            else:
                for parameter in self.parameters():
                    parameter.grad.zero_()
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True)
        return loss


class AcrossEpochs(Manual):
    """Steps every third batch, counted through, so that gradients are pending at epoch ends."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.manual_backward(loss)
        if self.trainer.fit_loop.epoch_loop.batch_progress.total.ready % 3 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()
        return loss


class Scheduled(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.lr_schedulers().step()
        self.log("rate", self.lr_schedulers().get_last_lr()[0])
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class PlateauByHand(Scheduled):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Manual.training_step(self, batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.lr_schedulers().step(self.trainer.callback_metrics["train/loss"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)]


class Two(Manual):
    def __init__(self, alternate: bool = False) -> None:
        super().__init__()
        self.alternate = alternate

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for i, optimizer in enumerate(self.optimizers()):
            if self.alternate and batch_idx % 2 != i:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)
            self.log(f"loss/{i}", loss.detach(), on_step=True, on_epoch=True)

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.net[0].parameters(), lr=0.05, momentum=0.9)
        return [first, torch.optim.AdamW(self.net[2].parameters(), lr=0.01)]


class Gan(Net):
    """Generator and discriminator; `returns` is what the step returns."""

    def __init__(self, returns: str = "dict", every: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.judge = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(), nn.Linear(8, 1))
        self.make = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4))
        self.returns, self.every = returns, every

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        g, d = self.optimizers()
        x = batch[0]
        made = self.make(torch.randn(len(x), 2))
        bce = nn.functional.binary_cross_entropy_with_logits
        true, false = torch.ones(len(x), 1), torch.zeros(len(x), 1)
        self.toggle_optimizer(d)
        d_loss = bce(self.judge(x), true) + bce(self.judge(made.detach()), false)
        d.zero_grad()
        self.manual_backward(d_loss)
        d.step()
        self.untoggle_optimizer(d)
        g_loss = bce(self.judge(made), true)
        if batch_idx % self.every == 0:
            self.toggle_optimizer(g)
            g.zero_grad()
            self.manual_backward(g_loss)
            g.step()
            self.untoggle_optimizer(g)
        losses = {"g_loss": g_loss.detach(), "d_loss": d_loss.detach()}
        self.log_dict(losses, on_step=True, on_epoch=True, prog_bar=True)
        if self.returns == "dict":
            return losses
        return torch.stack(list(losses.values())) if self.returns == "tensor" else None

    def configure_optimizers(self) -> Any:
        g = torch.optim.Adam(self.make.parameters(), lr=0.01, betas=(0.5, 0.9))
        d = torch.optim.Adam(self.judge.parameters(), lr=0.01, betas=(0.5, 0.9))
        return [g, d], [
            torch.optim.lr_scheduler.StepLR(g, 1),
            torch.optim.lr_scheduler.StepLR(d, 2),
        ]


class WassersteinGan(Gan):
    """Its critic's weights are clipped, the generator steps every third batch."""

    def __init__(self) -> None:
        super().__init__("none", every=3)

    def on_train_batch_end(self, *args: Any) -> None:
        with torch.no_grad():
            for parameter in self.judge.parameters():
                parameter.clamp_(-0.1, 0.1)


class Returns(Manual):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx).detach()
        kinds = {
            "none": None,
            "dict": {"other": loss},
            "nested": {"losses": {"a": loss, "b": [loss, loss]}},
            "loss": {"loss": loss, "more": [1, 2]},
            "several": torch.stack([loss, loss]),
            "empty": {},
        }
        return kinds[self.kind]


class SkipsSome(Net):
    """No loss for some batches."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


class DictLoss(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": super().training_step(batch, batch_idx), "x": batch[0].mean()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log("x", outputs["x"])


class Fetches(Net):
    """Takes the iterator itself."""

    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        loss = self.loss(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch[0]))
        return loss


class FetchesByHand(Manual):
    def training_step(self, dataloader_iter: Any) -> Any:
        batch, _, _ = next(dataloader_iter)
        loss = self.loss(batch)
        self.optimizers().zero_grad()
        self.manual_backward(loss)
        self.optimizers().step()
        return loss


class LeavesEpochs(Net):
    """Ends an epoch before its time."""

    def __init__(self, at: int = 6, epoch: int | None = None) -> None:
        super().__init__()
        self.at, self.epoch = at, epoch

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        right = self.epoch is None or self.current_epoch == self.epoch
        return -1 if batch_idx == self.at and right else None


class Stops(Net):
    def __init__(self, hook: str, call: int) -> None:
        super().__init__()
        self.hook, self.call = hook, call

    def _seen(self, hook: str, count: int) -> None:
        if hook == self.hook and count >= self.call:
            self.trainer.should_stop = True

    def on_train_batch_end(self, *args: Any) -> None:
        self._seen("batch", self.global_step)

    def on_train_epoch_end(self) -> None:
        self._seen("epoch", self.current_epoch)

    def on_validation_epoch_end(self) -> None:
        self._seen("validation", self.global_step)

    def on_train_epoch_start(self) -> None:
        self._seen("start", self.current_epoch)


class PenaltyOfGradients(Manual):
    """A second derivative in the loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].requires_grad_()
        loss = nn.functional.mse_loss(self(x), batch[1])
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        self.optimizers().zero_grad()
        self.manual_backward(loss + slope.pow(2).sum())
        self.optimizers().step()


class OwnGradients(Manual):
    """Written into `.grad` by hand, averaged with those of the batch before."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        new = torch.autograd.grad(self.loss(batch), list(self.parameters()))
        for parameter, grad in zip(self.parameters(), new, strict=True):
            old: Tensor | None = parameter.grad
            parameter.grad = grad if old is None else 0.5 * (old + grad)
        self.optimizers().step()


INTERVAL = {"val_check_interval": 3}
SHAPES = {
    "plain": Shape(model=Manual),
    "plain_interval": Shape(model=Manual, trainer=INTERVAL),
    "every_fourth": Shape(model=EveryFourth),
    "every_fourth_interval": Shape(model=EveryFourth, trainer=INTERVAL),
    "every_fourth_by_module": Shape(model=lambda: EveryFourth("module")),
    "every_third_in_place": Shape(model=lambda: EveryFourth("in place", every=3)),
    "across_epochs": Shape(model=AcrossEpochs),
    "scheduled": Shape(model=Scheduled),
    "plateau_by_hand": Shape(model=PlateauByHand),
    "two_optimizers": Shape(model=Two),
    "two_alternating": Shape(model=lambda: Two(alternate=True)),
    "gan_dict": Shape(model=Gan),
    "gan_none": Shape(model=lambda: Gan("none")),
    "gan_tensor": Shape(model=lambda: Gan("tensor"), trainer=INTERVAL),
    "gan_wasserstein": Shape(model=WassersteinGan),
    "skips_some": Shape(model=SkipsSome),
    "skips_some_accumulate": Shape(model=SkipsSome, trainer={"accumulate_grad_batches": 2}),
    "dict_loss": Shape(model=DictLoss),
    "fetches": Shape(model=Fetches),
    "fetches_accumulate": Shape(model=Fetches, trainer={"accumulate_grad_batches": 3}),
    "fetches_interval": Shape(model=Fetches, trainer=INTERVAL),
    "fetches_by_hand": Shape(model=FetchesByHand),
    "leaves_epochs": Shape(model=LeavesEpochs),
    "leaves_one_epoch": Shape(model=lambda: LeavesEpochs(4, epoch=1)),
    "leaves_epochs_interval": Shape(model=LeavesEpochs, trainer=INTERVAL),
    "stops_in_batch": Shape(model=lambda: Stops("batch", 16)),
    "stops_in_batch_interval": Shape(model=lambda: Stops("batch", 14), trainer=INTERVAL),
    "stops_at_the_batch_of_a_signal": Shape(model=lambda: Stops("batch", 13)),
    "stops_at_epoch_end": Shape(model=lambda: Stops("epoch", 1)),
    "stops_at_epoch_start": Shape(model=lambda: Stops("start", 1)),
    "stops_in_validation": Shape(model=lambda: Stops("validation", 10)),
    "stops_in_validation_interval": Shape(model=lambda: Stops("validation", 12), trainer=INTERVAL),
    "gradient_penalty": Shape(model=PenaltyOfGradients),
    "own_gradients": Shape(model=OwnGradients),
}
KINDS = ("none", "dict", "nested", "loss", "several", "empty")
SHAPES |= {f"returns_{kind}": Shape(model=lambda kind=kind: Returns(kind)) for kind in KINDS}

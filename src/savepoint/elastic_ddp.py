"""Gradients that are added up in one fixed binary tree: the same bits on 1, 2, 4 or 8 processes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from savepoint.errors import ConfigError

Gradients = list[Tensor | None]


class Counter:
    """A binary counter: adds up equally large parts as a balanced tree does, one after another.

    It holds at most one sum of 1, 2, 4, ... parts each.
    """

    def __init__(self) -> None:
        self.parts = 0
        self._sums: list[tuple[int, Gradients]] = []

    def add(self, part: Gradients) -> None:
        self.parts += 1
        size = 1
        while self._sums and self._sums[-1][0] == size:
            _, before = self._sums.pop()
            part = added(before, part)
            size *= 2
        self._sums.append((size, part))

    def take(self) -> Gradients:
        """The sum of all parts, whose number is a power of two."""
        ((_, total),) = self._sums
        self.parts = 0
        self._sums = []
        return total


def added(one: Gradients, other: Gradients) -> Gradients:
    return [_sum(a, b) for a, b in zip(one, other, strict=True)]


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Of a weight without a gradient on one side: the other's."""
    if one is None:
        return other
    return one if other is None else one + other


class ElasticDDP(DDPStrategy):
    """DDP whose gradients are the same bits on any number of processes that is a power of two, on
    CPUs with equally many threads. For loaders with a `global_batch_size`.

    `--trainer.strategy elastic_ddp`. A global batch is 2, 4, 8, ... batches of the loader, and each
    gives its gradient alone. They are added in one binary tree over all of them: on a process by a
    binary counter, then between processes by recursive doubling. Nothing is added up during the
    backward, and each process holds a few copies of the gradients for it.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._sum = Counter()
        self._goes_on = False
        self._versions: dict[str, int] | None = None

    def setup(self, trainer: Trainer) -> None:
        self._sum = Counter()
        self._versions = None
        super().setup(trainer)

    def configure_ddp(self) -> None:
        """Leaves the model as it is, equal on all processes."""
        assert self.model is not None
        with torch.no_grad():
            for tensor in (*self.model.parameters(), *self.model.buffers()):
                torch.distributed.broadcast(tensor.detach(), 0)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning's, around each batch whose gradients wait for more."""
        self._goes_on = True
        try:
            yield
        finally:
            self._goes_on = False

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._versions is None:
            self._versions = self._buffers()
        output = super().training_step(*args, **kwargs)
        if output is None:
            raise ConfigError(
                "training_step returned nothing, which leaves a batch out of the tree of "
                "elastic_ddp. Return a loss for each batch, or use --trainer.strategy ddp."
            )
        self._refuse_changed_buffers(self._versions)
        self._versions = self._buffers()
        return output

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The gradient of one batch: on the last batch of the step, the mean of all.

        Lightning has divided the loss by the number of batches that this process accumulates, a
        power of two. Undone, each gradient has the same bits on any number of processes.
        """
        module = self.lightning_module
        assert module is not None
        parameters = [one for one in module.parameters() if one.requires_grad]
        for one in parameters:
            one.grad = None
        each = module.trainer.accumulate_grad_batches
        loss = self.precision_plugin.pre_backward(closure_loss * each, module)
        self.precision_plugin.backward(loss, module, optimizer, *args, **kwargs)
        self._sum.add([_dense(one.grad) for one in parameters])
        if not self._goes_on:
            self._refuse_another_count(each)
            total = _over_ranks(self._sum.take(), parameters)
            for one, gradient in zip(parameters, total, strict=True):
                one.grad = None if gradient is None else gradient / (each * self.world_size)
        self.precision_plugin.post_backward(loss, module)
        return closure_loss

    def _refuse_another_count(self, each: int) -> None:
        if self._sum.parts != each:
            raise ConfigError(
                f"Not a tree of {each} batches: {self._sum.parts} gave a gradient in this step. "
                "With elastic_ddp each batch is seen once. Use an optimizer that calls its closure "
                "once."
            )

    def _buffers(self) -> dict[str, int]:
        assert self.lightning_module is not None
        return {name: one._version for name, one in self.lightning_module.named_buffers()}

    def _refuse_changed_buffers(self, before: dict[str, int]) -> None:
        now = self._buffers()
        for name in [name for name in before if now.get(name) != before[name]]:
            raise ConfigError(
                f"Not the same bits on another number of processes: model.{name} is changed by a "
                "training step, and each process sees other samples. Running statistics, as of "
                "batch normalisation, depend on who saw what. Use a layer without (GroupNorm, "
                "LayerNorm), or --trainer.strategy ddp for the same samples alone."
            )


def _dense(gradient: Tensor | None) -> Tensor | None:
    if gradient is not None and gradient.layout != torch.strided:
        raise ConfigError(
            "A sparse gradient: elastic_ddp adds dense ones alone. Make its layer with "
            "sparse=False, or use --trainer.strategy ddp."
        )
    return gradient


def _over_ranks(own: Gradients, parameters: Sequence[Tensor]) -> Gradients:
    """The sum over all processes: with partners 1, 2, 4, ... away, so that each round adds
    neighbours of the tree. Both partners get the same bits, as a + b is b + a.
    """
    rank = torch.distributed.get_rank()
    distance = 1
    while distance < torch.distributed.get_world_size():
        partner = rank ^ distance
        own = added(own, _exchanged(own, parameters, partner))
        distance *= 2
    return own


def _exchanged(own: Gradients, parameters: Sequence[Tensor], partner: int) -> Gradients:
    """The partner's gradients, for ours: as bytes, whatever their types, after one byte for each
    that says whether it is there.
    """
    there = [int(gradient is not None) for gradient in own]
    parts = [torch.tensor(there, dtype=torch.uint8, device=parameters[0].device)]
    parts += [
        (torch.zeros_like(one) if gradient is None else gradient).contiguous().view(-1)
        for one, gradient in zip(parameters, own, strict=True)
    ]
    sent = torch.cat([part.view(torch.uint8) for part in parts])
    got = torch.empty_like(sent)
    calls = [
        torch.distributed.P2POp(torch.distributed.isend, sent, partner),
        torch.distributed.P2POp(torch.distributed.irecv, got, partner),
    ]
    for work in torch.distributed.batch_isend_irecv(calls):
        work.wait()
    sizes = [part.numel() * part.element_size() for part in parts]
    is_there, *bytes_of = torch.split(got, sizes)
    return [
        _tensor(raw, one) if flag else None
        for flag, raw, one in zip(is_there.tolist(), bytes_of, parameters, strict=True)
    ]


def _tensor(raw: Tensor, like: Tensor) -> Tensor:
    return raw.clone().view(like.dtype).view(like.shape)  # a copy: bytes may lie unaligned


StrategyRegistry.register(
    "elastic_ddp", ElasticDDP, description="The same bits on 1, 2, 4 or 8 processes"
)

"""Trainings whose state hides from a second look: members, sets, what stands twice, late forwards."""

import collections
import copy
import enum
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torchmetrics as tm
from lightning import Callback
from torch import Tensor

from shapes.base import Net, Shape


class Scaled(Net):
    """The loss times a number that some state gives."""

    def number(self, batch: Any) -> Any:
        raise NotImplementedError

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        number = self.number(batch)
        self.log("number", float(number))
        return super().training_step(batch, batch_idx) * number


# -- enums, texts and sets ------------------------------------------------------------------------


class Phase(enum.Enum):
    WARM = 1
    COLD = 2

    def __init__(self, value: int) -> None:
        self.uses = 0


def reset_phase() -> None:
    for one in Phase:
        one.uses = 0
    Stage.RAMP.value[:] = [1.0]


class EnumUses(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.phase = Phase.WARM

    def number(self, batch: Any) -> Any:
        self.phase.uses += 1
        return 1 / self.phase.uses


class EnumUsesNamed(Scaled):
    def number(self, batch: Any) -> Any:
        Phase.COLD.uses += 1
        return 1 / Phase.COLD.uses


class Stage(enum.Enum):
    RAMP = [1.0]  # noqa: RUF012


class EnumValue(Scaled):
    def number(self, batch: Any) -> Any:
        Stage.RAMP.value.append(Stage.RAMP.value[-1] * 0.9)
        return Stage.RAMP.value[-1]


class Tag(str):
    uses = 0


class TextNotes(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.tag = Tag("a")

    def number(self, batch: Any) -> Any:
        self.tag.uses += 1
        return 1 / self.tag.uses


@dataclass(frozen=True)
class Task:
    weight: float


class SetOfObjects(Scaled):
    """As many as before, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.tasks = {Task(1.0)}

    def number(self, batch: Any) -> Any:
        task = self.tasks.pop()
        self.tasks.add(Task(task.weight * 0.9))
        return task.weight


class Names(set[Any]):
    pass


class SetOfAClass(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.seen = Names({1})

    def number(self, batch: Any) -> Any:
        last = self.seen.pop()
        self.seen.add(last + 1)
        return 1 / last


ACTIVE: set[Any] = set()


class GlobalSetOfObjects(Scaled):
    def number(self, batch: Any) -> Any:
        if not ACTIVE:
            ACTIVE.add(Task(1.0))
        task = ACTIVE.pop()
        ACTIVE.add(Task(task.weight * 0.9))
        return task.weight


class SetOfMeters(Scaled):
    """The same objects, which count."""

    def __init__(self) -> None:
        super().__init__()
        self.meters = {Meter()}

    def number(self, batch: Any) -> Any:
        for meter in self.meters:
            meter.count += 1
        return 1 / meter.count


# -- classes and globals that lead elsewhere ------------------------------------------------------


class Late(Scaled):
    last: ClassVar[Any] = None


class ClassHistory(Late):
    """A loss that is kept with its history."""

    def number(self, batch: Any) -> Any:
        before = Late.last
        Late.last = self.loss(batch)
        return 1.0 if before is None else float(before) + 1


class ClassTeacher(Late):
    """A network that a class holds, made in mid-training."""

    def number(self, batch: Any) -> Any:
        if self.global_step == 4:
            Late.last = copy.deepcopy(self.net)
        return 1.0 if Late.last is None else Late.last(batch[0]).mean().detach() + 1


class ClassOptimizer(Late):
    """An object of a library that another one takes the place of."""

    def number(self, batch: Any) -> Any:
        if self.global_step % 3 == 0:
            Late.last = torch.distributions.Normal(float(self.global_step), 1.0)
        return 1.0 if Late.last is None else Late.last.mean / 30 + 1


def double(x: Tensor) -> Tensor:
    return 2 * x


def half(x: Tensor) -> Tensor:
    return x / 2


class Patched(Scaled):
    """A method that another one takes the place of in mid-training."""

    act: ClassVar[Any] = torch.relu

    def scale(self, x: Tensor) -> Tensor:
        return x

    def number(self, batch: Any) -> Any:
        return self.scale(torch.ones(1))


class PatchedMethod(Patched):
    def number(self, batch: Any) -> Any:
        if self.global_step == 4:
            Patched.scale = lambda self, x: 2 * x  # type: ignore[method-assign]
        return super().number(batch)


class PatchedBuiltin(Patched):
    def number(self, batch: Any) -> Any:
        if self.global_step == 4:
            Patched.act = torch.sigmoid
        return type(self).act(torch.ones(1)) + 0.1


scaling = double


class PatchedGlobal(Scaled):
    def number(self, batch: Any) -> Any:
        global scaling
        if self.global_step == 4:
            scaling = half
        return scaling(torch.ones(1))


whole_scale = Patched.scale


def reset_shared() -> None:
    global scaling
    reset_phase()
    ACTIVE.clear()
    Late.last, Patched.act, Patched.scale = None, torch.relu, whole_scale  # type: ignore[method-assign]
    scaling = double


# -- what stood twice, and no more does -----------------------------------------------------------


class Recent(Scaled):
    """As many times one and the same, at the start."""

    def __init__(self, first: Any, make: Any, kind: Any = list) -> None:
        super().__init__()
        self.recent = kind([first] * 4)
        self.make = make

    def number(self, batch: Any) -> Any:
        self.recent[self.global_step % 4] = self.make(batch[0].mean())
        return sum((i + 1) * float(one[0]) for i, one in enumerate(self.recent)) + 1


class RecentDict(Scaled):
    def __init__(self) -> None:
        super().__init__()
        state = {"x": 0.0}
        self.states = {"now": state, "best": state}

    def number(self, batch: Any) -> Any:
        self.states["now"] = {"x": float(batch[0].mean())}
        if self.states["now"]["x"] > self.states["best"]["x"]:
            self.states["best"] = dict(self.states["now"])
        return 1 + self.states["best"]["x"] + 2 * self.states["now"]["x"]


class KeptArray(Scaled):
    """An array that comes to stand in a list, too."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.sum: Any = np.zeros(4) if kind == "array" else torch.zeros(4)
        self.kept: list[Any] = []

    def number(self, batch: Any) -> Any:
        self.sum += (
            batch[0].mean(0).numpy() if isinstance(self.sum, np.ndarray) else batch[0].mean(0)
        )
        if self.global_step % 6 == 5:
            self.kept.append(self.sum)
        if len(self.kept) > 2:
            self.sum = self.sum * 0
            self.kept = self.kept[1:]
        return 1 + sum(float(one.sum()) for one in self.kept)


class KeptElsewhere(Callback):
    """Holds what the model holds, and is written to at one of the two."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        if trainer.global_step % 6 == 5:
            self.held = [*self.held[-2:], module.sum]
            module.sum = module.sum * 0
        for one in self.held[-1:]:
            one += 0.1
        module.seen = self.held


class SeenElsewhere(Scaled):
    def __init__(self) -> None:
        super().__init__()
        self.sum = torch.zeros(4)
        self.seen: list[Any] = []

    def number(self, batch: Any) -> Any:
        self.sum += batch[0].mean(0)
        return 1 + sum(float(one.sum()) for one in self.seen) / 50


class Turned(Scaled):
    """Two that change places, in attributes and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.fast, self.slow = torch.zeros(4), torch.ones(4)
        self.both = [self.fast, self.slow]

    def number(self, batch: Any) -> Any:
        if self.global_step % 5 == 3:
            self.fast, self.slow = self.slow, self.fast
        if self.global_step % 7 == 4:
            self.both.reverse()
        self.fast += batch[0].mean(0)
        return 1 + float((self.both[0] - 0.5 * self.both[1]).sum()) / 50


class Parted(Scaled):
    """One list in two attributes, until one of them is given another one."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.numbers = [1.0]
        self.table = {"numbers": self.numbers}
        self.late = late

    def number(self, batch: Any) -> Any:
        if self.global_step == 4:
            if self.late:
                self.table = {"numbers": [2.0]}
            else:
                self.numbers = [2.0]
        self.numbers.append(self.table["numbers"][-1] * 0.9)
        self.table["numbers"][0] += 0.01
        return sum(self.numbers) / 10


class Ring(Scaled):
    """A ring of buffers, of which one is written to: not the same one each time."""

    def __init__(self, number: int, kind: str) -> None:
        super().__init__()
        make = np.zeros if kind == "array" else torch.zeros
        self.ring = collections.deque(make(4) for _ in range(number))
        self.current: Any = self.ring[0]

    def number(self, batch: Any) -> Any:
        self.ring.rotate(1)
        self.current = self.ring[0]
        mean = batch[0].mean(0)
        self.current += mean.numpy() if isinstance(self.current, np.ndarray) else mean
        return 1 + sum(float(one.sum()) for one in self.ring) / 50


class Rows(Scaled):
    """Rows of an array in a list: of a batch's, which nobody writes to, or of one's own."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        self.own = own
        self.bank = torch.zeros(3, 4)
        self.rows: list[Any] = []

    def number(self, batch: Any) -> Any:
        if self.own:
            self.bank += batch[0].mean(0)
        source = self.bank if self.own else batch[0]
        self.rows = [*self.rows[-4:], source[0], source[1]]
        return 1 + sum(float(one.sum()) for one in self.rows) / 50


class Twofold(Scaled):
    """A tensor and what `detach` makes of it, or an array and a tensor in its memory."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.last: Any = None
        self.all: list[Any] = []

    def number(self, batch: Any) -> Any:
        value = batch[0].mean(0)
        if self.kind == "detached":
            self.last, other = value, value.detach()
        else:
            self.last = value.numpy().copy()
            other = torch.from_numpy(self.last)
            self.last += 0.1
        self.all = [*self.all[-3:], other]
        return 1 + sum(float(one.sum()) for one in self.all) / 50


class KeptBuffer(Scaled):
    """A buffer that no state_dict has, in a list too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4), persistent=False)
        self.kept: list[Any] = []

    def number(self, batch: Any) -> Any:
        self.mean += batch[0].mean(0)
        if self.global_step == 3:
            self.kept = [self.mean]
        return 1 + sum(float(one.sum()) for one in self.kept) / 50


class Trained(Scaled):
    """Weights in a list, which the making of the optimizer fills."""

    def __init__(self) -> None:
        super().__init__()
        self.trained: list[Any] = []

    def configure_optimizers(self) -> Any:
        self.trained += self.net.parameters()
        self.later = list(self.net[0].parameters())
        return torch.optim.Adam(self.trained, lr=0.05)

    def number(self, batch: Any) -> Any:
        return 1 + sum(float(one.detach().abs().sum()) for one in [*self.trained, *self.later]) / 50


class BestWeights(Scaled):
    """Kept without a copy: they go on with the training."""

    def __init__(self) -> None:
        super().__init__()
        self.best: dict[str, Tensor] = {}

    def number(self, batch: Any) -> Any:
        if self.global_step == 4:
            self.best = self.state_dict()
        return 1 + sum(float(one.abs().sum()) for one in self.best.values()) / 50


class TwiceShared(Scaled):
    """A list that two attributes hold from the start on."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = [1.0]
        self.table = {"numbers": self.numbers}

    def number(self, batch: Any) -> Any:
        self.numbers.append(self.table["numbers"][-1] * 0.9)
        return self.table["numbers"][-1]


class ViewInside(Scaled):
    """A tensor and a view of it, in one dict that is made in mid-training."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.parts: dict[str, Any] = {}

    def number(self, batch: Any) -> Any:
        if not self.parts:
            whole: Any = np.zeros(4) if self.kind == "array" else torch.zeros(4)
            self.parts = {"whole": whole, "first": whole[:2]}
        self.parts["whole"] += 0.1
        return 1 + float(self.parts["first"].sum())


# -- canaries -------------------------------------------------------------------------------------


class LateForward(Net):
    """A forward that does other things from the second epoch on."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 4)
        self.what, self.calls = what, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.current_epoch and self.what == "draws":
            x = x + 0.1 * torch.randn_like(x)
        if self.current_epoch and self.what == "counts":
            self.calls += 1
            x = x / self.calls
        return super().forward(x)


class Meter:
    def __init__(self) -> None:
        self.count = 0


class ForwardMeter(Net):
    """A forward that changes something inside of an attribute."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(2, 4)
        self.held: Any = {"meter": Meter(), "array": np.zeros(1), "tensor": torch.zeros(1)}[what]

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.held, Meter):
            self.held.count += 1
            return super().forward(x) / self.held.count
        self.held += 1
        return super().forward(x) / float(self.held[0])


# -- metrics --------------------------------------------------------------------------------------


class Default(Scaled):
    """A metric whose reset leads to another state in each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = tm.SumMetric()

    def on_train_epoch_start(self) -> None:
        self.sum._defaults["sum_value"] = torch.tensor(float(self.current_epoch))
        self.sum.reset()

    def number(self, batch: Any) -> Any:
        if self.global_step % 10 > 5:
            self.sum.update(0.1)
        return 1 + self.sum.sum_value


class SetUpMetric(Scaled):
    """Updated where a fit begins, reset in training."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = tm.SumMetric()

    def on_fit_start(self) -> None:
        self.sum.update(1.0)

    def number(self, batch: Any) -> Any:
        if self.global_step == 3:
            self.sum.reset()
        return 1 + self.sum.sum_value


class ChangedState(Scaled):
    """A state that is written to, not by `update`."""

    def __init__(self) -> None:
        super().__init__()
        self.sum = tm.SumMetric()

    def number(self, batch: Any) -> Any:
        self.sum.sum_value = self.sum.sum_value + 0.1
        return 1 + self.sum.sum_value


SHAPES = {
    "enum_uses": Shape(EnumUses, reset=reset_shared),
    "enum_uses_named": Shape(EnumUsesNamed, reset=reset_shared),
    "enum_value": Shape(EnumValue, reset=reset_shared),
    "set_of_meters": Shape(SetOfMeters),
    "class_teacher": Shape(ClassTeacher, reset=reset_shared),
    "class_library": Shape(ClassOptimizer, reset=reset_shared),
    "trained": Shape(Trained),
    "best_weights": Shape(BestWeights),
    "twice_shared": Shape(TwiceShared),
    "text_notes": Shape(TextNotes),
    "set_of_objects": Shape(SetOfObjects),
    "set_of_a_class": Shape(SetOfAClass),
    "global_set_of_objects": Shape(GlobalSetOfObjects, reset=reset_shared),
    "class_history": Shape(ClassHistory, reset=reset_shared),
    "patched_method": Shape(PatchedMethod, reset=reset_shared),
    "patched_builtin": Shape(PatchedBuiltin, reset=reset_shared),
    "patched_global": Shape(PatchedGlobal, reset=reset_shared),
    "recent_tensors": Shape(lambda: Recent(torch.zeros(1), lambda mean: mean.view(1))),
    "recent_deque": Shape(
        lambda: Recent(torch.zeros(1), lambda mean: mean.view(1), collections.deque)
    ),
    "recent_arrays": Shape(lambda: Recent(np.zeros(1), lambda mean: mean.view(1).numpy())),
    "recent_lists": Shape(lambda: Recent([0.0], lambda mean: [float(mean)])),
    "recent_dict": Shape(RecentDict),
    "forward_draws_late": Shape(lambda: LateForward("draws")),
    "forward_counts_late": Shape(lambda: LateForward("counts")),
    "forward_meter": Shape(lambda: ForwardMeter("meter")),
    "forward_array": Shape(lambda: ForwardMeter("array")),
    "forward_tensor": Shape(lambda: ForwardMeter("tensor")),
    "metric_default": Shape(Default),
    "metric_set_up": Shape(SetUpMetric),
    "metric_changed": Shape(ChangedState),
    "kept_array": Shape(lambda: KeptArray("array")),
    "kept_tensor": Shape(lambda: KeptArray("tensor")),
    "view_inside": Shape(lambda: ViewInside("tensor")),
    "view_inside_array": Shape(lambda: ViewInside("array")),
    "kept_elsewhere": Shape(SeenElsewhere, callbacks=lambda: [KeptElsewhere()]),
    "turned": Shape(Turned),
    "parted": Shape(lambda: Parted(late=False)),
    "parted_late": Shape(lambda: Parted(late=True)),
    "ring": Shape(lambda: Ring(3, "tensor")),
    "ring_of_arrays": Shape(lambda: Ring(3, "array")),
    "ring_of_many": Shape(lambda: Ring(20, "tensor")),
    "rows_of_batches": Shape(lambda: Rows(own=False)),
    "rows_of_its_own": Shape(lambda: Rows(own=True)),
    "detached": Shape(lambda: Twofold("detached")),
    "array_and_tensor": Shape(lambda: Twofold("array")),
    "kept_buffer": Shape(KeptBuffer),
}

"""What a training changes is seen, saved where it is plain and put back in place; else it is named."""

import collections
import io
import random
import sys
import weakref
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from savepoint.look.baseline import Baseline, changed_since, put_back_into_model
from savepoint.look.classes import is_library
from savepoint.look.kinds import Unpackable
from savepoint.look.marks import mark, sum_of_all
from savepoint.look.pack import pack
from savepoint.look.unpack import each_once, unpack
from savepoint.look.walk import Before, Look

CPU = torch.device("cpu")


class Phase(Enum):
    WARM = 1
    COLD = 2


class Helper:
    __slots__ = ("count", "recent")

    def __init__(self) -> None:
        self.count, self.recent = 0, collections.deque([1], maxlen=3)


class Model(nn.Module):
    savepoint_skip = frozenset({"cache"})

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        self.register_buffer("mean", torch.zeros(2), persistent=False)
        self.number, self.text, self.history = 0, "a", [1, 2]
        self.table: Any = {"x": [1], (1, 2): {3}}
        self.array, self.tensor = np.zeros(3), torch.zeros(2)
        self.phase, self.helper, self.generator = Phase.WARM, Helper(), np.random.default_rng(0)
        self.python, self.cache = random.Random(1), 0
        self.view = self.net[0].weight.data
        self.alias = self.history
        count = 0

        def counted() -> int:
            nonlocal count
            count += 1
            return count

        self.counted = counted


def look(model: nn.Module, before: Before = Before()) -> Look:  # noqa: B008 - cannot be changed
    return Look({"model": model}, {}, model.state_dict().keys(), before=before)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "number": lambda m: setattr(m, "number", 2**80),
    "text": lambda m: setattr(m, "text", "b"),
    "list": lambda m: m.history.append(3.5),
    "dict": lambda m: m.table.update(y=(1, b"z")),
    "inner list": lambda m: m.table["x"].append(2),
    "array": lambda m: m.array.__setitem__(1, 5.0),
    "tensor in place": lambda m: m.tensor.add_(1),
    "tensor by its data": lambda m: m.tensor.data.add_(1),
    "tensor replaced": lambda m: setattr(m, "tensor", torch.ones(5)),
    "buffer": lambda m: m.mean.add_(1),
    "enum": lambda m: setattr(m, "phase", Phase.COLD),
    "slot of a helper": lambda m: setattr(m.helper, "count", 9),
    "deque of a helper": lambda m: m.helper.recent.extend([2, 3, 4]),
    "generator of numpy": lambda m: m.generator.normal(),
    "generator of python": lambda m: m.python.random(),
    "dropout": lambda m: setattr(m.net[1], "p", 0.1),
    "eval of a part": lambda m: m.net[1].eval(),
    "requires_grad": lambda m: m.net[0].bias.requires_grad_(False),
    "a cell of a function": lambda m: m.counted(),
    "a new attribute": lambda m: setattr(m, "later", {"a": torch.ones(1)}),
    "an attribute that is gone": lambda m: delattr(m, "text"),
    "many of one kind": lambda m: m.history.extend(range(500)),
    "many tuples": lambda m: setattr(
        m, "history", [(torch.ones(2) * i, i, str(i)) for i in range(99)]
    ),
}


def marks(model: nn.Module) -> dict[Any, Any]:
    seen = look(model)
    return {path: place.mark for path, place in seen.places.items() if not place.what}


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_saved_and_put_back_into_a_fresh_object(name: str) -> None:
    model, fresh = Model(), Model()
    base, fresh_base = Baseline(look(model)), Baseline(look(fresh))
    CHANGES[name](model)
    saved, named = base.changes(look(model))
    assert named == []
    assert saved
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)
    assert fresh_base.restore(look(fresh), read, CPU) == []
    assert marks(fresh) == marks(model)


def test_nothing_is_saved_of_what_has_not_changed_so_that_an_override_holds() -> None:
    model, overridden = Model(), Model()
    overridden.number = 7
    base, other = Baseline(look(model)), Baseline(look(overridden))
    model.history.append(1)
    saved, _ = base.changes(look(model))
    assert [path[-1] for path, _ in saved] == [["attr", "history"]]
    other.restore(look(overridden), saved, CPU)
    assert overridden.number == 7


def test_what_the_hooks_of_a_new_start_have_changed_is_taken_back() -> None:
    model = Model()
    base = Baseline(look(model))
    model.number, model.history[:] = 13, [9]
    base.restore(look(model), [], CPU)
    assert (model.number, model.history) == (0, [1, 2])


def test_values_are_put_back_into_the_very_objects_that_others_hold() -> None:
    model, fresh = Model(), Model()
    held = (fresh.history, fresh.table, fresh.tensor, fresh.array, fresh.helper.recent)
    base, fresh_base = Baseline(look(model)), Baseline(look(fresh))
    for name in ("list", "dict", "tensor in place", "array", "deque of a helper"):
        CHANGES[name](model)
    fresh_base.restore(look(fresh), base.changes(look(model))[0], CPU)
    now = (fresh.history, fresh.table, fresh.tensor, fresh.array, fresh.helper.recent)
    assert all(one is other for one, other in zip(held, now, strict=True))
    assert fresh.alias == [1, 2, 3.5]


def test_a_view_of_a_weight_is_never_written_to() -> None:
    model, fresh = Model(), Model()
    weight = fresh.net[0].weight.detach().clone()
    base, fresh_base = Baseline(look(model)), Baseline(look(fresh))
    model.view = torch.full((2, 2), 3.0)
    fresh_base.restore(look(fresh), base.changes(look(model))[0], CPU)
    assert torch.equal(fresh.net[0].weight, weight)
    assert torch.equal(fresh.view, model.view)


NAMED: dict[str, tuple[Callable[[Any, Path], Any], str]] = {
    "a file": (lambda m, p: setattr(m, "log", (p / "log").open("w")), "model.log (a file handle)"),
    "an iterator": (lambda m, p: setattr(m, "source", iter([1])), "model.source (an iterator"),
    "an object": (lambda m, p: setattr(m, "other", Helper()), "model.other (a new Helper)"),
    "objects": (lambda m, p: setattr(m, "others", [Helper()]), "model.others (a list of objects)"),
    "a function": (
        lambda m, p: setattr(m, "counted", lambda: 1),
        "model.counted (another function",
    ),
    "a layer": (lambda m, p: setattr(m, "net", nn.Identity()), "model.net (a new Identity)"),
    "a hook": (lambda m, p: m.net[0].register_forward_hook(print), "model.net.0 (other hooks"),
    "a graph": (lambda m, p: setattr(m, "tensor", m.net[0].weight * 2), "a gradient's history"),
    "a class": (lambda m, p: setattr(Model, "savepoint_count", 1), "Model.savepoint_count (shared"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_is_no_plain_value_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "savepoint_count", 0, raising=False)
    model = Model()
    base = Baseline(look(model))
    change, words = NAMED[name]
    change(model, tmp_path)
    if hasattr(model, "log"):
        model.log.close()
    assert any(words in one for one in base.changes(look(model))[1])


@pytest.mark.parametrize("name", [*CHANGES, *NAMED])
def test_a_look_after_another_one_sees_what_a_first_one_would(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Model, "savepoint_count", 0, raising=False)
    model = Model()
    first = look(model)
    base = Baseline(first)
    again = look(model, first.for_next)
    assert base.changes(again) == ([], [])
    if name in CHANGES:
        CHANGES[name](model)
    else:
        NAMED[name][0](model, tmp_path)
    saved, named = base.changes(look(model, again.for_next))
    fresh_saved, fresh_named = base.changes(look(model))
    if hasattr(model, "log"):
        model.log.close()
    assert [path for path, _ in saved] == [path for path, _ in fresh_saved]
    assert named == fresh_named
    assert saved or named


LEVEL = 1
LIMITS = {"low": 0}


def scaled(x: Any) -> Any:
    return x * LEVEL + LIMITS["low"]


class Scaling(nn.Module):
    factor = 1
    seen: ClassVar[list[int]] = []

    def forward(self, x: Any) -> Any:
        return scaled(x) * LATER if "LATER" in globals() else scaled(x)  # type: ignore[name-defined]  # noqa: F821


SHARED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "an attribute of a class": lambda patch: patch.setattr(Scaling, "factor", 2),
    "a new attribute of a class": lambda patch: patch.setattr(Scaling, "other", 2, raising=False),
    "a list of a class": lambda patch: patch.setattr(Scaling, "seen", [1]),
    "a global": lambda patch: patch.setitem(globals(), "LEVEL", 2),
    "a global that was not there": lambda patch: patch.setitem(globals(), "LATER", 2),
    "a value in a global": lambda patch: patch.setitem(LIMITS, "low", 5),
    "an attribute of a function": lambda patch: patch.setattr(scaled, "calls", 1, raising=False),
}


@pytest.mark.parametrize("name", SHARED)
def test_what_is_shared_is_seen_in_each_look(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Scaling()
    first = look(model)
    base = Baseline(first)
    again = look(model, first.for_next)
    assert base.changes(again) == ([], [])
    SHARED[name](monkeypatch)
    assert len(base.changes(look(model, again.for_next))[1]) == 1


def test_a_look_keeps_nothing_of_the_looks_before_it_alive() -> None:
    model = Model()
    before = look(model).for_next
    model.tensor = torch.zeros(3)
    gone = weakref.ref(model.tensor)
    before = look(model, before).for_next
    model.tensor = torch.zeros(4)
    before = look(model, before).for_next
    assert gone() is None


def test_what_a_class_leaves_out_is_not_looked_at() -> None:
    model = Model()
    base = Baseline(look(model))
    model.cache = object()  # type: ignore[assignment]
    assert base.changes(look(model)) == ([], [])


def test_another_kind_of_value_than_the_code_of_today_has_is_named_and_left() -> None:
    model, fresh = Model(), Model()
    fresh.history = {1, 2}  # type: ignore[assignment]
    base, fresh_base = Baseline(look(model)), Baseline(look(fresh))
    model.history.append(3)
    assert fresh_base.restore(look(fresh), base.changes(look(model))[0], CPU) == ["model.history"]
    assert fresh.history == {1, 2}


def test_a_file_changes_no_class_and_no_inner_name() -> None:
    model = Model()
    base = Baseline(look(model))
    path = [["root", "model"], ["attr", "__class__"], ["attr", "number"]]
    assert base.restore(look(model), [[path, 3]], CPU) == ["model.__class__.number"]
    assert not hasattr(Model, "number")


def test_a_compiled_part_has_the_place_of_what_was_compiled() -> None:
    model, compiled = Model(), Model()
    compiled.net = torch.compile(compiled.net, backend="eager")  # type: ignore[assignment]
    base, other = Baseline(look(model)), Baseline(look(compiled))
    model.net[1].p = 0.2
    assert other.restore(look(compiled), base.changes(look(model))[0], CPU) == []
    assert compiled.net._orig_mod[1].p == 0.2


def test_what_an_epoch_goes_by_is_named_when_it_changes() -> None:
    model = Model()
    marks = look(model).marks_below(model.helper)
    assert changed_since(marks, look(model)) == []
    model.helper.count = 1
    assert "model.helper.count" in changed_since(marks, look(model))[0]


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2**70, 1.5, float("inf"), 1j, "x", b"", b"ab", (), [1, [2]], {1: (2,)}, {1, 2}, frozenset({1}),
     collections.deque([1], 2), np.float32(2), np.arange(6).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16),
     torch.device("cpu"), Path("a/b"), ["a"] * 200, list(range(200)), [torch.ones(1)] * 20],
    ids=repr,
)  # fmt: skip
def test_a_packed_value_is_read_back_as_it_was(value: Any) -> None:
    file = io.BytesIO()
    torch.save(pack(value), file)
    file.seek(0)
    packed = torch.load(file, weights_only=True)
    with each_once():
        found = unpack(packed)
    assert mark(pack(found)) == mark(pack(value))
    assert isinstance(found, type(value) if not isinstance(value, Path) else object)


def test_a_model_that_is_used_gets_its_own_changes_and_not_those_of_what_a_training_made() -> None:
    model, used = Model(), Model()
    base = Baseline(look(model))
    model.teacher = Helper()
    base.accept(look(model))
    model.teacher.count, model.number = 3, 5
    model.eval()
    saved, named = base.changes(look(model))
    assert named == []
    assert put_back_into_model(used, saved, CPU) == []
    assert used.number == 5
    assert used.training
    assert not hasattr(used, "teacher")


def test_a_model_that_is_used_says_what_is_of_another_kind_in_it() -> None:
    model, used = Model(), Model()
    used.history = {1, 2}  # type: ignore[assignment]
    base = Baseline(look(model))
    model.history.append(3)
    assert put_back_into_model(used, base.changes(look(model))[0], CPU) == ["model.history"]


@pytest.mark.parametrize(
    ("file", "library"),
    [
        ("/elsewhere/lib/python3.11/site-packages/one/__init__.py", True),
        ("/usr/lib/python3/dist-packages/two.py", True),
        ("/home/me/project/src/three.py", False),
    ],
)
def test_what_is_installed_for_another_environment_is_installed_too(
    file: str, library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A venv with --system-site-packages sees torch in a place that is not its own."""
    module = ModuleType(f"found_in_{library}_{len(file)}")
    module.__file__ = file
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert is_library(module.__name__) is library


def test_empty_tensors_share_no_memory_and_views_of_the_same_memory_do() -> None:
    model = Model()
    base = Baseline(look(model))
    model.first, model.second = torch.empty(0), torch.empty(0)
    assert base.changes(look(model))[1] == []
    model.bank = torch.zeros(3, 2)
    model.row = model.bank[1]
    assert base.changes(look(model))[1] == ["model.row (shares its memory with model.bank)"]


class Holder(nn.Module):
    def __init__(self, one: bool) -> None:
        super().__init__()
        self.bank = torch.zeros(2)
        self.held = [self.bank if one else torch.zeros(2)]


def resumed(model: Holder, base: Baseline, other: Holder) -> Holder:
    """`other`, of another process, after a resume from where `model` is."""
    saved, named = base.changes(look(model))
    assert named == []
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    start = Baseline(look(other))
    assert start.restore(look(other), torch.load(file, weights_only=True), CPU) == []
    return other


def test_what_comes_to_stand_in_two_attributes_is_one_after_a_resume() -> None:
    model = Holder(one=False)
    base = Baseline(look(model))
    model.held.append(model.bank)  # which is as it was at the start, and is saved nevertheless
    other = resumed(model, base, Holder(one=False))
    assert other.held[1] is other.bank


def test_what_stands_in_two_attributes_no_more_is_two_after_a_resume() -> None:
    model = Holder(one=True)
    base = Baseline(look(model))
    model.bank = torch.ones(2)
    other = resumed(model, base, Holder(one=True))
    assert other.bank.tolist() == [1, 1]
    assert other.held[0].tolist() == [0, 0]


def test_two_that_change_places_are_each_put_into_an_object_of_its_own() -> None:
    model = Holder(one=True)
    base = Baseline(look(model))
    model.held.insert(0, torch.ones(2))
    other = resumed(model, base, Holder(one=True))
    assert [one.tolist() for one in other.held] == [[1, 1], [0, 0]]
    assert other.held[1] is other.bank


@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_a_view_that_stands_beside_its_base_is_named(kind: str) -> None:
    model = Model()
    base = Baseline(look(model))
    whole: Any = torch.zeros(4)
    whole += 1
    if kind == "array":
        whole = whole.numpy()
    model.held = {"whole": whole, "first": whole[:2]}
    assert base.changes(look(model))[1] == ["model.held (holds a view of model.held)"]


def test_rows_of_a_batch_in_a_list_share_nothing() -> None:
    model = Model()
    base = Baseline(look(model))
    batch = torch.zeros(4, 2)
    batch += 1
    model.held = [*batch, *batch.numpy().copy().T]
    assert base.changes(look(model))[1] == []


def test_what_nobody_writes_to_may_stand_in_a_list_without_its_gradient() -> None:
    model = Model()
    base = Baseline(look(model))
    model.last = torch.zeros(4) * 2
    model.held = [model.last.detach()]
    assert base.changes(look(model))[1] == []


def test_a_tensor_that_stands_twice_is_one_again_after_a_file(tmp_path: Path) -> None:
    best = torch.zeros(2)
    torch.save(pack({"last": best, "best": best, "other": torch.zeros(2)}), tmp_path / "file")
    packed = torch.load(tmp_path / "file", weights_only=True)
    with each_once():
        value = unpack(packed)
    value["last"].add_(1)
    assert value["best"].tolist() == [1, 1]
    assert value["other"].tolist() == [0, 0]
    assert unpack(packed)["best"] is not value["best"]


@pytest.mark.parametrize(
    "value",
    [[0], {"a": 1}, collections.deque([1]), np.zeros(2), nn.Parameter(torch.ones(2)),
     collections.OrderedDict(a=1), bytearray(b"a")],
    ids=repr,
)  # fmt: skip
def test_what_can_be_written_to_and_stands_twice_is_one_again(value: Any, tmp_path: Path) -> None:
    torch.save(pack({"last": value, "all": [value, [value]]}), tmp_path / "file")
    packed = torch.load(tmp_path / "file", weights_only=True)
    with each_once():
        found = unpack(packed)
    assert type(found["last"]) is type(value)
    assert found["all"][0] is found["last"]
    assert found["all"][1][0] is found["last"]


def test_a_container_that_holds_itself_is_named() -> None:
    model = Model()
    base = Baseline(look(model))
    model.history.append(model.history)  # type: ignore[arg-type]
    assert base.changes(look(model))[1] == ["model.history (a container that holds itself)"]


class TestHistories:
    """Of a tensor that is kept without `.detach()`."""

    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))

    def test_one_that_a_backward_pass_has_freed_is_its_numbers(self) -> None:
        loss = self.net(torch.ones(1, 2)).mean()
        loss.backward()
        assert torch.equal(pack(loss), loss.detach())
        assert not pack(loss).requires_grad

    def test_one_whose_weights_were_written_to_is_its_numbers(self) -> None:
        kept = self.net(torch.ones(1, 2)).relu()
        with torch.no_grad():
            self.net[2].weight.add_(1)
        assert torch.equal(pack(kept), kept.detach())

    @pytest.mark.parametrize("leads", ["to all", "to a part"])
    def test_one_that_a_gradient_can_go_back_on_is_refused(self, leads: str) -> None:
        kept = self.net(torch.ones(1, 2)).mean()
        if leads == "to a part":
            freed = self.net(torch.ones(1, 2)).mean()
            freed.backward()
            kept = freed + self.net[2].bias.sum()
        with pytest.raises(Unpackable, match="history"):
            pack(kept)

    def test_what_is_computed_anew_by_a_hook_is_not_asked(self) -> None:
        asked = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, asked.append):
            kept = self.net(torch.ones(1, 2)).mean()
        with pytest.raises(Unpackable):
            pack(kept)
        assert asked == []


def counted(name: str, function: Callable[[Any], None]) -> Callable[[Any], None]:
    def called(self: Any) -> None:
        self.calls.append(name)
        function(self)

    return called


def nothing(self: Any) -> None: ...


class Decorated(nn.Module):
    """By a decorator that forgets `functools.wraps`."""

    one, other, third = (counted(name, nothing) for name in ("one", "other", "third"))


def test_functions_of_one_name_keep_their_places_when_another_one_is_met() -> None:
    model = Decorated()
    first = look(model)
    number = 1
    model.late = lambda: number
    later = look(model, first.for_next)
    kept = [path for path in first.places if path[0][0] == "function"]
    assert len(kept) == 3
    assert set(kept) <= later.places.keys()


class Copying(TorchDispatchMode):
    """How many values the largest new tensor has."""

    most = 0

    def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = call(*args, **(kwargs or {}))
        if not call.is_view:
            self.most = max(self.most, made.numel())
        return made


def test_ranks_compare_their_weights_by_a_sample_and_copy_none_of_them() -> None:
    filters = torch.ones(512, 512, 3, 3, requires_grad=True)
    weights = [filters.to(memory_format=torch.channels_last), torch.ones(2048, 1024).T]
    weights += [torch.tensor(1.0), torch.ones(2, dtype=torch.bfloat16)]
    with Copying() as copying:
        before = sum_of_all(weights, 4)
    assert copying.most < 2**19
    assert sum_of_all([one.clone() for one in weights], 4) == before
    for number, one in enumerate(weights):
        assert sum_of_all([*weights[:number], one * 2, *weights[number + 1 :]], 4) != before

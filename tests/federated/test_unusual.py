"""Strategies, models and data that keep something in unusual places: a run that was stopped and
resumed equals a straight one, or its checkpoints say why not.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from support import federated, rounds, unusual
from support.federated import TINY

from savepoint.checkpoint import format, manifest
from savepoint.config import typed
from savepoint.errors import ConfigError
from savepoint.federated import strategy
from savepoint.federated.federation import Federation
from savepoint.federated.local_grid import LocalGrid
from savepoint.federated.messages import arrays_of
from savepoint.federated.state import StrategyState
from savepoint.federated.strategy import Repeatable
from savepoint.federated.training import LocalTraining, Trained

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")

TWO = ["--federated.num_server_rounds", "2"]
FOUR = ["--federated.num_server_rounds", "4"]
SLOWER = ["--federated.lr_decay", "0.5"]


def model(kind: type) -> list[str]:
    net = "{class_path: ConvNet, init_args: {width: 4}}"
    arguments = f"{{net: {net}, optimizer: sgd, lr: 0.05, schedule: constant}}"
    return ["--model", f"{{class_path: support.unusual.{kind.__name__}, init_args: {arguments}}}"]


def data(kind: type) -> list[str]:
    arguments = "{dataset: digits, batch_size: 32}"
    return ["--data", f"{{class_path: support.unusual.{kind.__name__}, init_args: {arguments}}}"]


def local(*flags: str) -> LocalTraining:
    return LocalTraining(typed.parse([*TINY, *flags]))


def trained(training: LocalTraining, client: int, number: int, state: Any = None) -> Trained:
    received = training.model.state_dict()
    return training.train(client, number, received, state or {}, lr_factor=0.5)


def assert_same(one: Trained, other: Trained) -> None:
    assert one.metrics == other.metrics
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


# -- clients -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags",
    [*map(model, unusual.MODELS), data(unusual.OwnOrder), data(unusual.PlainLoader)],
    ids=lambda flags: flags[1].split("unusual.")[1].split(",")[0],
)
def test_what_a_client_makes_depends_on_no_other_client_and_no_process(flags: list[str]) -> None:
    one, other = local(*flags), local(*flags)
    first = trained(one, 1, 2)
    with other.watched():
        trained(other, 0, 1)
        trained(other, 2, 2)
        assert_same(first, trained(other, 1, 2))
    assert not other.shared


def test_each_client_has_callbacks_of_its_own_and_makes_what_it_makes_without_any() -> None:
    called = local("--trainer.callbacks", "[{class_path: support.unusual.Batches}]")
    plain = local()
    for client in (0, 1):
        assert_same(trained(called, client, 1), trained(plain, client, 1))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (data(unusual.GoesByCalls), "data.calls (changed by a client)"),
        (model(unusual.OnItsClass), "OnItsClass.calls (shared by all that use it)"),
    ],
    ids=["data", "class"],
)
def test_what_clients_change_and_share_makes_a_checkpoint_inexact(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert rounds.train(tmp_path / "run", *flags, *TWO) == 0
    facts = manifest.read(federated.newest(tmp_path / "run"))
    assert not facts["exact"]
    assert [reason for reason in facts["unsaved"] if reason.endswith(said)]
    assert "A resume will not be exact: " in capsys.readouterr().out


def test_data_that_each_setup_reads_anew_are_no_change_of_a_client(tmp_path: Path) -> None:
    assert rounds.train(tmp_path / "run", *data(unusual.ReadsAnew), *TWO) == 0
    assert manifest.read(federated.newest(tmp_path / "run"))["exact"]


@pytest.mark.parametrize("kind", [unusual.Sequence, unusual.TwoOptimizers])
def test_the_learning_rate_of_a_round_is_scaled_whatever_the_schedule(kind: type) -> None:
    training = local(*model(kind))
    received = training.model.state_dict()
    still = training.train(1, 1, received, {}, lr_factor=1e-12)
    for name, _ in training.model.named_parameters():
        assert torch.allclose(still.weights[name], received[name], atol=1e-8)


def test_a_client_may_keep_arrays_sets_and_dicts_of_any_keys(tmp_path: Path) -> None:
    flags = model(unusual.Memory)
    assert rounds.train(tmp_path / "whole", *flags, *FOUR) == 0
    assert rounds.train(tmp_path / "parts", *flags, *TWO) == 0
    assert rounds.resume(tmp_path / "parts", *FOUR) == 0
    federated.assert_equal(tmp_path / "whole", tmp_path / "parts")


def test_a_state_of_a_client_that_cannot_be_saved_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Odd.client_state.* holds a object"):
        trained(local(*model(unusual.Odd)), 1, 1)


def test_a_model_that_takes_no_state_back_is_refused_before_the_first_round() -> None:
    with pytest.raises(ConfigError, match="Forgets has client_state and no load_client_state"):
        local(*model(unusual.Forgets))


# -- strategies ----------------------------------------------------------------------------------


def made(kind: type, number: int = 3) -> Repeatable:
    LocalGrid(None, 1)  # type: ignore[arg-type]  # whose task messages are made in
    name = f"support.unusual.{kind.__name__}"
    federation = Federation(num_clients=number, strategy=name)
    return Repeatable(strategy.build(federation), federation, 0)


def reply(node: int, number: int) -> Message:
    arrays = arrays_of({"weight": torch.full((3,), float(node % 7))})
    metrics = MetricRecord({"num-examples": 5, "train/loss": 1.0 / number})
    content: Any = {"arrays": arrays, "metrics": metrics}
    asked = Message(RecordDict(), dst_node_id=node, message_type="train")
    return Message(
        RecordDict({**content, "savepoint": ConfigRecord({"outcome": "done"})}), reply_to=asked
    )


def played(repeatable: Repeatable, *numbers: int) -> Any:
    """The arrays and metrics of the last of these rounds."""
    found: Any = None
    for number in numbers:
        asked = [(client, reply(client + 1, number)) for client in (0, number % 2 + 1)]
        arrays, metrics = repeatable.aggregate_train(number, asked)
        assert arrays is not None
        assert metrics is not None
        found = arrays["weight"].numpy().tolist(), dict(metrics)
    return found


@pytest.mark.parametrize("kind", unusual.STRATEGIES)
def test_a_strategy_goes_on_as_if_it_had_never_stopped(kind: type) -> None:
    straight = played(made(kind), 1, 2, 3, 4)
    stopped = made(kind)
    state = StrategyState(stopped.strategy)
    played(stopped, 1, 2)
    saved = state.capture()
    assert saved["unsaved"] == []
    format.check_readable(saved)
    resumed = made(kind)
    assert played(made(kind), 3, 4) != straight or kind is unusual.Deletes
    StrategyState(resumed.strategy).restore(saved)
    assert played(resumed, 3, 4) == straight


@pytest.mark.parametrize("kind", unusual.INEXACT)
def test_what_a_strategy_has_that_no_checkpoint_holds_is_named(kind: type) -> None:
    repeatable = made(kind)
    state = StrategyState(repeatable.strategy)
    played(repeatable, 1, 2)
    [reason] = state.capture()["unsaved"]
    assert reason.endswith(unusual.INEXACT[kind])


def test_a_strategy_sees_clients_by_number_whatever_nodes_they_are() -> None:
    """Flower draws the ids of nodes anew in each run, but for the grid in this process."""
    by_number, drawn = made(unusual.ByClient), made(unusual.ByClient)
    played(by_number, 1)
    drawn.aggregate_train(1, [(0, reply(2**61 + 5, 1)), (2, reply(2**60, 1))])
    assert drawn.strategy.rounds == by_number.strategy.rounds == {1: 1, 3: 3}


def test_a_run_says_that_a_resume_will_not_be_exact_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--federated.strategy", "support.unusual.Iterates"]
    assert rounds.train(tmp_path / "run", *flags, *TWO) == 0
    assert capsys.readouterr().out.count("not be exact: strategy.numbers (an iterator") == 1
    assert rounds.resume(tmp_path / "run", *FOUR, "--plan") == 0
    assert "(not exact: strategy.numbers (an iterator (count)))" in capsys.readouterr().out


def test_a_state_larger_than_a_look_at_a_training_takes_is_saved() -> None:
    repeatable = made(unusual.Alias)
    state = StrategyState(repeatable.strategy)
    repeatable.strategy.one = np.zeros(2**28 + 1, np.uint8)
    saved = state.capture()
    assert saved["unsaved"] == []
    assert saved["changed"]


# -- whole runs ----------------------------------------------------------------------------------

RUNS = {
    **{kind.__name__: model(kind) for kind in unusual.MODELS},
    **{kind.__name__: data(kind) for kind in (unusual.OwnOrder, unusual.PlainLoader)},
    **{
        kind.__name__: ["--federated.strategy", f"support.unusual.{kind.__name__}"]
        for kind in unusual.STRATEGIES
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_killed_ends_as_a_straight_one(name: str, tmp_path: Path) -> None:
    flags = [*RUNS[name], *rounds.KEEPS, *SLOWER]
    code, said = federated.train(tmp_path / "whole", *flags)
    assert code == 0, said
    federated.killed(tmp_path / "killed", flags, "before the server saves", 3)
    code, said = federated.resume(tmp_path / "killed")
    assert code == 0, said
    federated.assert_equal(tmp_path / "whole", tmp_path / "killed")

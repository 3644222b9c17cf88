"""Any strategy of Flower's, by its name, and what it keeps from round to round."""

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import FedAvg
from support import rounds

from savepoint.checkpoint import format
from savepoint.errors import ConfigError, ConfigMismatchError
from savepoint.federated import strategy
from savepoint.federated.federation import Federation
from savepoint.federated.local_grid import LocalGrid
from savepoint.federated.messages import arrays_of, tensors_of
from savepoint.federated.state import StrategyState, changed_names
from savepoint.federated.strategy import Repeatable

FAMILY = {
    "FedAvg": {}, "FedProx": {"proximal_mu": 0.1}, "FedAvgM": {"server_momentum": 0.5}, "FedAdagrad": {},
    "FedAdam": {}, "FedYogi": {}, "FedMedian": {}, "FedTrimmedAvg": {"beta": 0.1}, "Krum": {}, "MultiKrum": {},
    "Bulyan": {}, "QFedAvg": {"client_learning_rate": 0.05, "train_loss_key": "train/loss"},
}  # fmt: skip


def given(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": name, "init_args": arguments}


@pytest.fixture(autouse=True)
def identity() -> None:
    LocalGrid(None, 1)  # type: ignore[arg-type]  # whose task messages are made in


@pytest.mark.parametrize("name", FAMILY)
def test_each_of_flowers_strategies_is_made_by_its_name(name: str) -> None:
    made = strategy.build(Federation(strategy=given(name, **FAMILY[name]), fraction_train=0.3))
    assert type(made) is getattr(flowers, name)
    assert made.fraction_train == 0.3
    StrategyState(made)


def test_all_but_those_of_trees_are_known_here() -> None:
    wrappers = {name for name in flowers.__all__ if name.startswith("DifferentialPrivacy")}
    others = {"Strategy", "Result", *strategy.OF_TREES}
    assert set(flowers.__all__) == {*FAMILY, *wrappers, *others}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILY)
def test_a_run_with_each_strategy_ends_and_repeats_itself(name: str, tmp_path: Path) -> None:
    flags = [
        "--federated.strategy",
        name,
        "--federated.num_server_rounds",
        "2",
        "--federated.fraction_train",
        "1.0",
    ]
    for key, value in FAMILY[name].items():
        flags += [f"--federated.strategy.{key}", str(value)]
    for run in ("one", "two"):
        assert rounds.train(tmp_path / run, *flags) == 0
    assert rounds.history(tmp_path / "one") == rounds.history(tmp_path / "two")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("FedAwg", "Did you mean FedAvg"),
        ("FedXgbBagging", "of trees"),
        (given("FedAdam", eta_=1), "Unknown key: federated.strategy.eta_. Did you mean eta"),
        (given("QFedAvg"), "refuses its arguments.*client_learning_rate"),
        ("no.such.Module", "No such class"),
        (given("FedAdam", eta="fast"), "Wrong value of --federated.strategy.eta: fast. .* float"),
        (given("FedAvg", weighted_by_key=3), "Wrong value of .*weighted_by_key: 3. Expected str"),
    ],
)
def test_a_strategy_that_is_wrong_is_said(wrong: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        strategy.build(Federation(strategy=wrong))


# -- what it samples -----------------------------------------------------------------------------


def sampled(number: int, seed: int = 0, kind: str = "configure_train") -> list[int]:
    federation = Federation(num_clients=40)
    repeatable = Repeatable(strategy.build(federation), federation, seed)
    arrays = arrays_of({"w": torch.zeros(2)})
    return [client for client, _ in getattr(repeatable, kind)(number, arrays, ConfigRecord())]


def test_whom_a_round_asks_depends_on_seed_and_round_alone() -> None:
    random.seed(1)
    first = sampled(3)
    random.seed(2)
    assert sampled(3) == first == sorted(first)
    assert len(first) == 10
    assert sampled(4) != first
    assert sampled(3, seed=1) != first
    assert sampled(3, kind="configure_evaluate")[:10] != first


def test_sampling_leaves_the_generators_of_the_process_alone() -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.random(), np.random.rand()
    random.seed(1)
    np.random.seed(1)
    sampled(3)
    assert (random.random(), np.random.rand()) == expected


# -- what it keeps -------------------------------------------------------------------------------


class Own(FedAvg):
    """A user's strategy, with a state of many kinds."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.seen: dict[int, list[str]] = {}
        self.best, self.mean = 0.0, None
        self.drift: Any = None

    def change(self) -> None:
        self.seen[3] = ["a", "b"]
        self.best, self.mean = 0.5, np.arange(3.0)
        self.drift = [ArrayRecord([np.ones(2, np.float32)]), (1, {"x": np.float64(2)})]


class Talkative(FedAvg):
    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.connection: Any = None


class Silent(Talkative):
    savepoint_skip = frozenset({"connection"})


def test_only_what_has_changed_is_saved_and_is_put_back() -> None:
    one = Own()
    state = StrategyState(one)
    assert state.capture()["changed"] == []
    one.change()
    saved = state.capture()
    assert changed_names(saved) == ["best", "drift", "mean", "seen"]
    format.check_readable(saved)
    other = Own()
    StrategyState(other).restore(saved)
    assert (other.seen, other.best) == (one.seen, one.best)
    assert other.mean.tolist() == [0, 1, 2]
    [arrays, (number, inner)] = other.drift
    assert arrays.to_numpy_ndarrays()[0].tolist() == [1, 1]
    assert (number, float(inner["x"])) == (1, 2.0)
    assert StrategyState(Own()).capture()["changed"] == []


def test_what_a_config_overrides_on_a_resume_is_not_undone() -> None:
    old, new = (
        strategy.build(Federation(strategy=given("FedAdam", eta=eta))) for eta in (0.1, 0.5)
    )
    state = StrategyState(old)
    old.m_t = {"w": np.ones(2)}
    StrategyState(new).restore(state.capture())
    assert new.eta == 0.5
    assert new.m_t["w"].tolist() == [1, 1]


def test_a_state_that_cannot_be_saved_is_named_unless_the_class_says_that_it_is_none() -> None:
    for kind, named in ((Talkative, ["strategy.connection (an iterator (count))"]), (Silent, [])):
        one = kind()
        state = StrategyState(one)
        assert state.capture()["unsaved"] == []
        one.connection = itertools.count()
        assert state.capture()["unsaved"] == named


def test_a_state_that_has_no_place_is_refused() -> None:
    one: Any = Own()
    state = StrategyState(one)
    one.drift = {"a": 1}
    one.mean = np.ones(2)
    saved = state.capture()
    saved["changed"] = [[[*place, ["attr", "x"]], value] for place, value in saved["changed"]]
    with pytest.raises(ConfigMismatchError, match=r"Own has no place for strategy.*\.x"):
        StrategyState(Own()).restore(saved)


def test_a_strategy_inside_another_is_saved_too() -> None:
    inner = given("FedAdam")
    wrapped = given(
        "DifferentialPrivacyServerSideAdaptiveClipping",
        strategy=inner,
        noise_multiplier=0.1,
        num_sampled_clients=3,
    )
    made: Any = strategy.build(Federation(strategy=wrapped))
    state = StrategyState(made)
    made.clipping_norm = 0.7
    made.strategy.v_t = {"w": np.ones(1)}
    other: Any = strategy.build(Federation(strategy=wrapped))
    StrategyState(other).restore(state.capture())
    assert (other.clipping_norm, other.strategy.v_t["w"].tolist()) == (0.7, [1.0])


class Halves(FedAvg):
    """As in Flower's advanced example: the learning rate is halved, in a config that stays."""

    def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
        if server_round == 2:
            config["lr"] = config["lr"] * 0.5
        return super().configure_train(server_round, arrays, config, grid)

    def start(self, *args: Any, **named: Any) -> Any:
        raise AssertionError("the rounds are Savepoint's")


def test_what_a_strategy_does_to_its_config_lasts_beyond_a_resume(tmp_path: Path, capsys) -> None:
    flags = ["--federated.strategy", "federated.test_strategies.Halves"]
    from support.federated import assert_equal

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    name = f"{Halves.__module__}.Halves"
    flags = ["--federated.strategy", name]
    assert rounds.train(whole, *flags) == 0
    assert "Halves.start is not called" in capsys.readouterr().out
    assert rounds.train(parts, *flags, "--federated.num_server_rounds", "2") == 0
    assert rounds.resume(parts, "--federated.num_server_rounds", "4") == 0
    assert_equal(whole, parts)


def test_privacy_at_the_server_and_at_clients_repeats_itself(tmp_path: Path) -> None:
    """Its noise comes from generators that are seeded for the round."""
    name = "DifferentialPrivacyClientSideFixedClipping"
    inner = "{class_path: FedAvg}"
    flags = ["--federated.strategy", name, "--federated.strategy.strategy", inner]
    flags += [
        "--federated.strategy.noise_multiplier",
        "0.1",
        "--federated.strategy.clipping_norm",
        "1.0",
    ]
    flags += ["--federated.strategy.num_sampled_clients", "3", "--federated.num_server_rounds", "2"]
    flags += ["--federated.mods", "[flwr.clientapp.mod.fixedclipping_mod]"]
    for run in ("one", "two"):
        assert rounds.train(tmp_path / run, *flags) == 0
    assert rounds.history(tmp_path / "one") == rounds.history(tmp_path / "two")


# -- what is sent --------------------------------------------------------------------------------


def test_a_mean_of_counts_is_a_count_again() -> None:
    like = {"n": torch.tensor(3), "w": torch.zeros(2, dtype=torch.bfloat16)}
    sent = arrays_of({"n": torch.tensor(7), "w": torch.ones(2, dtype=torch.bfloat16)})
    assert sent["w"].numpy().dtype == np.float32
    counts = sent["n"].numpy()
    counts *= 0.5  # as QFedAvg does
    assert tensors_of(sent, like)["n"].item() == 7
    back = tensors_of(arrays_of({"n": torch.tensor(6.9999), "w": torch.ones(2)}), like)
    assert back["n"].dtype == torch.int64
    assert back["n"].item() == 7
    assert back["w"].dtype == torch.bfloat16

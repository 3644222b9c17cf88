"""Rounds in which something fails: what counts, what is said, what is kept."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

from flwr.app import Message
from support import federated, rounds
from support.rounds import KEEPS, error, is_of, resume, spoilt, train
from support.run_dirs import flip

from savepoint import files
from savepoint.checkpoint import store
from savepoint.errors import (
    CheckpointSaveError,
    ClientStateError,
    ConfigError,
    FederatedError,
    NonFiniteLossError,
    RunLockedError,
)
from savepoint.federated import asking, client_app
from savepoint.federated.clients import ClientStates
from savepoint.federated.local_grid import LocalGrid
from savepoint.federated.server import Server
from savepoint.federated.training import LocalTraining
from savepoint.run import Run

NO_RETRY = ["--federated.retries", "0"]
ALL = ["--federated.min_replies", "3"]


def fails(kind: str, number: int, client: int | None = None, times: int = 99) -> rounds.Spoil:
    """Replies of a kind in a round are errors: of one client, or of all."""
    left = [times]

    def spoil(message: Message, reply: Message) -> Message | None:
        its = client is None or message.metadata.dst_node_id == client + 1
        if not (its and is_of(message, kind, number) and left[0]):
            return reply
        left[0] -= 1
        return error(message)

    return spoil


def first_asked(directory: Path, number: int) -> int:
    return rounds.history(directory)[number - 1]["clients"][0]


def test_a_client_that_fails_is_counted_and_said_and_the_round_counts(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client = first_asked(straight, 2)
    assert train(tmp_path / "run", *KEEPS, how=spoilt(fails("train", 2, client))) == 0
    row = rounds.history(tmp_path / "run")[1]
    assert client not in row["clients"]
    assert row["failures"] == {str(client): "RuntimeError: out of luck"}
    said = capsys.readouterr().out
    assert "1 failure" in said
    assert f"client {client} failed: RuntimeError: out of luck" in said


def test_a_lost_reply_counts_as_a_failure(straight: Path, tmp_path: Path) -> None:
    client = first_asked(straight, 2)

    def lose(message: Message, reply: Message) -> Message | None:
        is_its = is_of(message, "train", 2) and message.metadata.dst_node_id == client + 1
        return None if is_its else reply

    assert train(tmp_path / "run", *KEEPS, how=spoilt(lose)) == 0
    assert rounds.history(tmp_path / "run")[1]["failures"] == {str(client): "no reply"}


def test_those_that_failed_are_asked_again_where_too_few_replied(
    straight: Path, tmp_path: Path
) -> None:
    """And the run ends as one without the failure."""
    client = first_asked(straight, 2)
    grids: list[Any] = []
    how = spoilt(fails("train", 2, client, times=1), grids)
    assert train(tmp_path / "run", *KEEPS, *ALL, how=how) == 0
    asked = [who for kind, who, number in grids[0].asked if kind == "train" and number == 2]
    assert asked.count(client) == 2
    assert len(asked) == 4
    assert rounds.history(tmp_path / "run") == rounds.history(straight)


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_too_few_replies_end_the_run_with_the_last_good_round_saved(
    straight: Path, tmp_path: Path, kind: str
) -> None:
    directory = tmp_path / "run"
    with pytest.raises(FederatedError, match="Too few replies in round 3: 0 of") as raised:
        train(directory, *KEEPS, "--checkpoint.save_every_epochs", "4", how=spoilt(fails(kind, 3)))
    assert raised.value.exit_code == 1
    assert "after 2 attempts" in str(raised.value)
    assert "Saved at round 2. Go on with: " in str(raised.value)
    assert federated.newest(directory).name == "step-00000002.ckpt"
    assert resume(directory, "--checkpoint.save_every_epochs", "1") == 0
    assert rounds.history(directory) == rounds.history(straight)


def test_a_run_whose_round_failed_and_was_resumed_equals_one_without_the_failure(
    straight: Path, tmp_path: Path
) -> None:
    with pytest.raises(FederatedError):
        train(tmp_path / "run", *KEEPS, how=spoilt(fails("train", 3)))
    assert resume(tmp_path / "run") == 0
    federated.assert_equal(straight, tmp_path / "run")


def test_too_few_clients_end_the_run_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "LOOK_SECS", 0.01)

    class Few(LocalGrid):
        def get_node_ids(self) -> list[int]:
            return [1]

    how = rounds.on(lambda server: Few(client_app.app, 5))
    with pytest.raises(FederatedError, match="Too few clients are connected: 1 in 0 s"):
        train(tmp_path / "run", "--federated.timeout", "0.1", how=how)


def test_a_client_that_is_too_slow_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(LocalGrid):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            messages = list(messages)
            is_slow = bool(messages) and is_of(messages[0], "train", 2)
            return super().send_and_receive(messages[:2] if is_slow else messages, timeout=timeout)

    how = rounds.on(lambda server: Slow(client_app.app, 5))
    assert train(tmp_path / "run", how=how) == 0
    assert list(rounds.history(tmp_path / "run")[1]["failures"].values()) == ["no reply"]


# -- the states of clients -----------------------------------------------------------------------


@pytest.fixture
def stopped(straight: Path, tmp_path: Path) -> Path:
    """A copy of the straight run, which two rounds more go on from."""
    directory = tmp_path / "stopped"
    shutil.copytree(straight, directory)
    return directory


MORE = ["--federated.num_server_rounds", "6"]


def a_state(directory: Path) -> tuple[int, Path]:
    state, _ = store.load(federated.newest(directory))
    client, version = next(iter(state["federated"]["clients"].items()))
    return client, directory / f"clients/partition-{client:05d}/step-{version['round']:08d}.ckpt"


def another_state(path: Path) -> None:
    states = ClientStates([path.parent.parent], int(path.parent.name[-5:]))
    states.save({"state_dict": {}}, int(path.stem[-8:]), "another run", keep=range(99))


@pytest.mark.parametrize("spoil", [Path.unlink, another_state])
def test_a_state_that_is_lost_or_of_another_run_ends_a_resume_before_its_first_round(
    stopped: Path, spoil: Any
) -> None:
    client, path = a_state(stopped)
    spoil(path)
    before = federated.newest(stopped)
    with pytest.raises(ClientStateError, match=f"state of client {client} is not the one"):
        resume(stopped, *MORE)
    assert federated.newest(stopped) == before


def test_a_damaged_state_ends_the_run_when_it_is_read(stopped: Path) -> None:
    for path in (stopped / "clients").rglob("step-*.ckpt"):
        flip(path)
    with pytest.raises(ClientStateError, match=r"damaged.*--allow clients"):
        resume(stopped, *MORE)


def test_clients_whose_state_is_lost_begin_anew_where_that_is_allowed(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(stopped / "clients")
    assert resume(stopped, *MORE, "--allow", "clients") == 0
    assert "has begun anew: its state was lost" in capsys.readouterr().out


def test_a_state_of_a_dead_attempt_is_never_used(straight: Path, tmp_path: Path) -> None:
    """Newer than all that the checkpoint names, and another one than the round would make."""
    directory = tmp_path / "run"
    with pytest.raises(FederatedError):
        train(directory, *KEEPS, how=spoilt(fails("train", 3)))
    for client in range(5):
        ClientStates([directory / "clients"], client).save({"user": 1}, 3, "dead", keep=range(9))
    assert resume(directory) == 0
    federated.assert_equal(straight, directory)


# -- disks, locks, weights -----------------------------------------------------------------------


def test_a_full_disk_at_a_client_is_a_failure_of_that_client(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = first_asked(straight, 2)
    real = ClientStates.save

    def full(self: ClientStates, state: Any, number: int, *more: Any) -> Any:
        if (self.client, number) == (client, 2):
            raise CheckpointSaveError("Saving failed: No space left on device", self.directory)
        return real(self, state, number, *more)

    monkeypatch.setattr(ClientStates, "save", full)
    assert train(tmp_path / "run", *KEEPS) == 0
    assert "No space left" in rounds.history(tmp_path / "run")[1]["failures"][str(client)]


def test_a_full_disk_at_the_server_ends_no_run_and_shows_in_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = files.rewriting

    def full(path: Path) -> Any:
        if path.name in ("step-00000003.ckpt", "step-00000004.ckpt"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path)

    monkeypatch.setattr(files, "rewriting", full)
    assert train(tmp_path / "run") == 1
    said = capsys.readouterr()
    assert "round 4/4" in said.out
    assert "No space left" in said.err
    assert federated.newest(tmp_path / "run").name == "step-00000002.ckpt"


def test_two_servers_on_one_run_are_refused(stopped: Path) -> None:
    holder = Run.open(stopped)
    try:
        with pytest.raises(RunLockedError, match="trains"):
            Run.open(stopped)
    finally:
        holder.unlock()


def test_weights_that_are_not_finite_are_never_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LocalTraining.train

    def diverges(self: LocalTraining, client: int, number: int, *more: Any, **named: Any) -> Any:
        made = real(self, client, number, *more, **named)
        if number == 3:
            next(iter(made.weights.values())).fill_(float("nan"))
        return made

    monkeypatch.setattr(LocalTraining, "train", diverges)
    with pytest.raises(NonFiniteLossError, match="not finite at step 3"):
        train(tmp_path / "run")
    assert federated.newest(tmp_path / "run").name == "step-00000002.ckpt"


def test_a_strategy_that_ends_the_run_says_why_in_words(tmp_path: Path) -> None:
    key = ["--federated.strategy", "FedAvg", "--federated.strategy.weighted_by_key", "nope"]
    said = "FedAvg has ended the run in round 1: .*`nope`.* The clients have sent num-examples, tr"
    with pytest.raises(FederatedError, match=said):
        train(tmp_path / "run", *key)


def test_a_strategy_that_makes_no_model_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.serverapp.strategy import FedAvg

    monkeypatch.setattr(FedAvg, "aggregate_train", lambda *_: (None, None))
    with pytest.raises(FederatedError, match="No model in round 1: FedAvg"):
        train(tmp_path / "run")


def test_a_data_module_that_cannot_be_divided_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from project.data import ImageData

    monkeypatch.delattr(ImageData, "part")
    with pytest.raises(ConfigError, match="ImageData has no part"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("personal", "[net.clasify]", r"No such part of the model: .*net.clasify.*net.classify"),
        ("mods", "[flwr.clientapp.mod.fixedclip]", "No such client mod: .*fixedclip"),
    ],
)
def test_a_name_of_nothing_is_said_before_there_is_a_run(
    tmp_path: Path, flag: str, value: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        train(tmp_path / "run", f"--federated.{flag}", value)
    assert not (tmp_path / "run").exists()


def test_a_server_starts_with_what_its_config_says(tmp_path: Path) -> None:
    seen: list[Server] = []

    def how(server: Server) -> None:
        seen.append(server)
        raise FederatedError("enough")

    with pytest.raises(FederatedError, match="No round is saved"):
        train(tmp_path / "run", how=how)
    assert seen[0].progress.round == 0


def test_a_mirror_that_would_lack_the_clients_is_refused(tmp_path: Path) -> None:
    mirror = ["--checkpoint.mirror", f"file://{tmp_path / 'mirror'}"]
    with pytest.raises(ConfigError, match="A mirror of a federated run"):
        train(tmp_path / "run", *mirror)
    assert not (tmp_path / "run").exists()

"""One client's training and evaluation, and Flower's grid in this process."""

from typing import Any

import pytest

pytest.importorskip("flwr")

import numpy as np
import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from support.federated import TINY

import project  # noqa: F401
from savepoint.config import typed
from savepoint.federated.local_grid import FAILED, LocalGrid
from savepoint.federated.messages import array_of
from savepoint.federated.training import LocalTraining
from savepoint.look.unpack import unpack

# As in any process that builds one; here each test has filters of its own.
pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")


def local(*flags: str) -> LocalTraining:
    return LocalTraining(typed.parse([*TINY, *flags]))


@pytest.fixture(scope="module")
def training() -> LocalTraining:
    return local("--federated.personal", "[net.classify]", "--federated.keep_optimizer", "true")


def sent(training: LocalTraining) -> dict[str, torch.Tensor]:
    return {n: t for n, t in training.model.state_dict().items() if training.federation.sends(n)}


def test_a_round_of_a_client_repeats_itself_and_touches_nothing(training: LocalTraining) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = training.train(1, 2, sent(training), {})
    torch.rand(5)
    two = training.train(1, 2, sent(training), {})
    assert one.metrics == two.metrics
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), before)
    other = training.train(1, 3, sent(training), {})
    assert other.metrics != one.metrics


def test_a_round_that_begins_with_a_state_repeats_itself_too(training: LocalTraining) -> None:
    """It does where a SIGTERM has ended it at its first batch."""
    kept = training.train(1, 1, sent(training), {}).keeps
    one = training.train(1, 2, sent(training), kept)
    two = training.train(1, 2, sent(training), kept)
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)


def test_a_client_goes_on_with_its_own_head_and_optimizer(training: LocalTraining) -> None:
    first = training.train(1, 1, sent(training), {})
    assert set(first.keeps["state_dict"]) == {"net.classify.weight", "net.classify.bias"}
    assert first.keeps["optimizer_states"][0]
    with_state = training.train(1, 2, sent(training), first.keeps)
    without = training.train(1, 2, sent(training), {})
    assert not torch.equal(
        with_state.weights["net.classify.bias"], without.weights["net.classify.bias"]
    )
    only_head = {"state_dict": first.keeps["state_dict"]}
    assert with_state.metrics != training.train(1, 2, sent(training), only_head).metrics


def test_the_learning_rate_of_a_round_is_scaled(training: LocalTraining) -> None:
    still = training.train(1, 1, sent(training), {}, lr_factor=1e-12)
    for name, _ in training.model.named_parameters():
        assert torch.allclose(still.weights[name], training.model.state_dict()[name], atol=1e-8)


def test_fedprox_holds_the_weights_near_the_received_ones(training: LocalTraining) -> None:
    def moved(mu: float) -> float:
        made = training.train(1, 1, sent(training), {}, proximal_mu=mu)
        pairs = ((made.weights[n], p.detach()) for n, p in training.model.named_parameters())
        return sum(float((one - other).norm()) for one, other in pairs)

    assert moved(10.0) < moved(0.0)


def test_a_model_may_keep_any_plain_state_at_its_client() -> None:
    kind = "support.unusual.Counting"
    text = (
        f"{{class_path: {kind}, init_args: {{net: {{class_path: ConvNet}}, schedule: constant}}}}"
    )
    base = ["--config", "configs/federated/digits.yaml", "--trainer.limit_train_batches", "2"]
    training = LocalTraining(typed.parse([*base, "--model", text]))
    state: dict[str, Any] = {}
    for number in (1, 2):
        state = training.train(1, number, sent(training), state).keeps
        assert unpack(state["user"]) == {"visits": number}
    assert training.model.visits == 0


def test_what_a_client_raises_comes_back_as_an_error() -> None:
    app = ClientApp()

    @app.query()
    def ask(message: Message, context: Any) -> Message:
        if context.node_config["partition-id"] == 1:
            raise KeyError("broken")
        return Message(RecordDict({"is": ConfigRecord({"n": 1})}), reply_to=message)

    grid = LocalGrid(app, 2)
    questions = [
        Message(RecordDict(), dst_node_id=node, message_type="query")
        for node in grid.get_node_ids()
    ]
    good, bad = grid.send_and_receive(questions)
    assert good.content["is"]["n"] == 1
    assert good.metadata.src_node_id == 1
    assert good.metadata.reply_to_message_id
    assert (bad.error.code, "broken" in bad.error.reason) == (FAILED, True)
    names = list(grid.push_messages(questions[:1]))
    assert [one.content["is"]["n"] for one in grid.pull_messages(names)] == [1]
    assert list(grid.pull_messages(names)) == []
    at_once = 0.0
    assert list(grid.send_and_receive(questions, timeout=at_once)) == []


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3),
        np.array(True),
        np.zeros((0, 3)),
        np.arange(6)[::-2],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).numpy(),
        np.ones((2, 3), np.complex64),
        np.ones(3, ">f4"),
    ],
)
def test_an_array_is_read_as_flower_reads_it(array: Any) -> None:
    sent = Array(np.asarray(array))
    read, expected = array_of(sent), sent.numpy()
    assert (read.dtype, read.shape) == (expected.dtype, expected.shape)
    assert read.tobytes() == expected.tobytes()


@pytest.mark.parametrize("broken", [lambda data: data[:-1], lambda data: b"no array"])
def test_a_damaged_array_is_refused_as_flower_refuses_it(broken: Any) -> None:
    whole = Array(np.ones(3))
    damaged = Array(whole.dtype, whole.shape, whole.stype, broken(whole.data))
    with pytest.raises(ValueError, match=r"."):
        damaged.numpy()
    with pytest.raises(ValueError, match=r"."):
        array_of(damaged)

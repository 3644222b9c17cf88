"""What is asked for with shards, and what is refused in words; commands on a checkpoint in shards."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateFinder, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from support.checkpoint_files import names
from support.run_dirs import make_run, say
from support.shards import flip, in_store, write_halves
from support.small import SmallModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.state import ranks
from savepoint.errors import ConfigError, RunDirectoryError
from savepoint.resume.overrides import fit_strategy
from savepoint.sharded import pieces
from savepoint.sharded.saving import require_shared
from savepoint.sharded.strategy import Sharding
from savepoint.sharded.together import Ranks

Capture = pytest.CaptureFixture[str]


def trainer(strategy: type[Any], *callbacks: Any) -> Any:
    return SimpleNamespace(
        strategy=object.__new__(strategy),
        world_size=2,
        callbacks=list(callbacks),
        lightning_module=SmallModel(),
    )


def refusal(trainer: Any, sharded: Any = "auto") -> str:
    with pytest.raises(ConfigError) as refused:
        ranks.refuse_with_shards(trainer, sharded)
    return str(refused.value)


def test_shards_are_refused_where_nothing_is_known_of_what_the_ranks_hold() -> None:
    said = refusal(trainer(SingleDeviceStrategy), True)
    assert said.startswith("Nothing is known to share out: checkpoint.sharded is true")
    ranks.refuse_with_shards(trainer(SingleDeviceStrategy), "auto")
    ranks.refuse_with_shards(trainer(DDPStrategy), True)


@pytest.mark.parametrize(
    ("callback", "what"),
    [
        (LearningRateFinder(), "a finder of learning rates"),
        (WeightAveraging(), "an average of the weights"),
    ],
)
def test_what_does_not_go_with_shards_is_named(callback: Any, what: str) -> None:
    said = refusal(trainer(ModelParallelStrategy, callback))
    assert said.startswith(f"Not supported where the state is spread over ranks: {what}")


def test_tensor_parallelism_is_refused_as_its_ranks_would_read_different_samples() -> None:
    given = trainer(ModelParallelStrategy)
    names = ("data_parallel", "tensor_parallel")
    for sizes, refused in (((2, 1), False), ((1, 2), True)):
        mesh = DeviceMesh(
            "cpu",
            torch.arange(2).reshape(sizes),
            mesh_dim_names=names,
            _init_backend=False,
            _rank=0,
        )
        given.strategy._device_mesh = mesh
        if not refused:
            ranks.refuse_shards(given)
            continue
        with pytest.raises(ConfigError, match=r"^Not supported: tensor_parallel_size is 2\."):
            ranks.refuse_shards(given)


def config(**of_trainer: Any) -> Any:
    sizes = Namespace(data_parallel_size=2, tensor_parallel_size=1)
    strategy = Namespace(class_path="a.ModelParallelStrategy", init_args=sizes)
    return Namespace(trainer=Namespace(strategy=strategy, num_nodes=1, **of_trainer))


def test_with_another_number_of_devices_the_sizes_of_the_strategy_follow() -> None:
    four = config(devices="4")
    fit_strategy(four, ["--trainer.devices", "4"])
    assert four.trainer.strategy.init_args.data_parallel_size == 4
    one = config(devices=1)
    fit_strategy(one, ["--trainer.devices=1"])
    assert one.trainer.strategy == "auto"


def test_a_strategy_that_the_user_gives_stays_as_it_is() -> None:
    given = config(devices="4")
    fit_strategy(given, ["--trainer.devices", "4", "--trainer.strategy.data_parallel_size", "2"])
    fit_strategy(given, ["--trainer.max_epochs", "4"])
    assert given.trainer.strategy.init_args.data_parallel_size == 2


def test_commands_take_a_directory_as_they_take_a_file(tmp_path: Path, capsys: Capture) -> None:
    path = in_store(tmp_path / "run" / "checkpoints", 30)
    code, said, _ = say(capsys, "ls", str(tmp_path / "run"))
    assert (code, "yes, 2 shards" in said) == (0, True)
    code, said, _ = say(capsys, "show", str(path))
    assert (code, "shard-00001.ckpt 0.0" in said) == (0, True)
    code, said, _ = say(capsys, "verify", "--deep", str(path))
    assert code == 0
    assert "loads, is finite" in said
    code, said, _ = say(
        capsys, "export", str(path), "--format", "ckpt", "-o", str(tmp_path / "a.ckpt")
    )
    assert code == 0
    assert store.load(tmp_path / "a.ckpt")[1]["world_size"] == 2
    code, said, _ = say(capsys, "diff", str(path), str(tmp_path / "a.ckpt"))
    assert (code, said.startswith("A ")) == (0, True)
    assert names(path) == ["common.ckpt", "shard-00000.ckpt", "shard-00001.ckpt"]
    flip(path / "shard-00001.ckpt")
    code, said, _ = say(capsys, "verify", str(path))
    assert code == 1
    assert "does not verify: shard-00001.ckpt: one or more damaged bytes in record" in said


@pytest.mark.parametrize(
    "command", [["audit"], ["replay", "--step", "40"], ["bisect", "{run}"]], ids=lambda one: one[0]
)
def test_what_trains_in_one_process_refuses_a_run_in_shards(
    tmp_path: Path, capsys: Capture, command: list[str]
) -> None:
    run_dir = make_run(tmp_path, steps=(10,))
    for path in (run_dir / "checkpoints").iterdir():
        path.unlink()
    known = {
        "at": "epoch",
        "exact": True,
        "dataset": {"name": "small", "fingerprint": "1"},
        "device": "cpu",
    }
    for step in (20, 40):
        write_halves(run_dir / f"checkpoints/step-{step:08d}.ckpt", step, **known)
    words = [word.format(run=run_dir) for word in command]
    code, _, said = say(capsys, words[0], str(run_dir), *words[1:])
    assert (code, "A training of 2 processes: " in said) == (2, True), said


class Twins(SmallModel):
    def __init__(self) -> None:
        super().__init__()
        self.twin = nn.Linear(6, 8)
        self.twin.weight = self.net[0].weight


def test_under_ddp_weights_and_moments_are_shared_out_and_neither_buffers_nor_numbers() -> None:
    module = Twins()
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(4, 6)).sum().backward()
    optimizer.step()
    given = trainer(DDPStrategy)
    given.lightning_module, given.optimizers = module, [optimizer]
    given.strategy._model_averaging_period = None
    sharding = object.__new__(Sharding)
    sharding.trainer = given
    state = {"state_dict": module.state_dict(), "optimizer_states": [optimizer.state_dict()]}
    held = sharding._held_by_all(state)
    assert held is not None
    weights = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    in_file = {key.removeprefix("state_dict.") for key in held if key.startswith("state_dict.")}
    assert in_file == set(weights)
    kinds = {
        key.rpartition(".")[2] for key in held.keys() - {f"state_dict.{one}" for one in weights}
    }
    assert kinds == {"exp_avg", "exp_avg_sq"}
    writers = pieces.shared_out(held.values(), 2)
    tied = [held[f"state_dict.{name}.weight"] for name in ("net.0", "twin")]
    assert writers[id(tied[0])] == writers[id(tied[1])]


@pytest.mark.parametrize("in_a_thread", [False, True])
def test_another_rank_than_the_first_forgets_a_failure_once_a_later_save_succeeds(
    tmp_path: Path, in_a_thread: bool
) -> None:
    """Or it would ask for a save every minute, and end with 1."""
    writer = CheckpointIO(async_save=in_a_thread)
    strategy = SimpleNamespace(checkpoint_io=writer, reduce=lambda flag, reduce_op: flag)
    strategy.barrier = lambda _: None
    other = SimpleNamespace(
        global_step=1,
        current_epoch=0,
        is_global_zero=False,
        lightning_module=SmallModel(),
        strategy=strategy,
        save_checkpoint=lambda *_, **__: None,
    )
    saver = CheckpointCallback(async_save=in_a_thread).saver
    saver.sharding = SimpleNamespace(ranks=SimpleNamespace(first=lambda _: None))  # type: ignore[assignment]
    saver.failure = OSError("the disk is full")
    saver.save(other, "batch", reason="steps")  # type: ignore[arg-type]
    writer.wait()
    assert saver.failure is None


def test_gc_deletes_directories_as_it_deletes_files(tmp_path: Path, capsys: Capture) -> None:
    run_dir = make_run(tmp_path, steps=(10,))
    for step in (20, 30):
        in_store(run_dir / "checkpoints", step, float(step))
    assert say(capsys, "gc", str(run_dir))[0] == 0
    assert [name for name in names(run_dir / "checkpoints") if "step-" in name] == [
        "step-00000010.ckpt",  # the best
        "step-00000030.ckpt",
    ]


def test_a_directory_that_another_host_does_not_see_is_refused_and_left_clean(
    tmp_path: Path,
) -> None:
    class OneOfAnotherHost(Ranks):
        def together(self, job: Any) -> list[Any]:
            return [*super().together(job), False]

    require_shared(Ranks(), tmp_path)
    with pytest.raises(RunDirectoryError, match="Rank 1 does not see the directory of rank 0"):
        require_shared(OneOfAnotherHost(), tmp_path)
    assert list(tmp_path.iterdir()) == []

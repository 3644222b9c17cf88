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
from support.shards import flip, in_store
from support.small import SmallModel
from torch.distributed.device_mesh import DeviceMesh

from savepoint.checkpoint import store
from savepoint.checkpoint.callback import CheckpointCallback
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.state import ranks
from savepoint.errors import ConfigError, RunDirectoryError
from savepoint.resume.overrides import fit_strategy
from savepoint.sharded.saving import require_shared
from savepoint.sharded.together import Ranks

Capture = pytest.CaptureFixture[str]


def trainer(strategy: type[Any], *callbacks: Any) -> Any:
    return SimpleNamespace(
        strategy=object.__new__(strategy),
        world_size=2,
        callbacks=list(callbacks),
        lightning_module=SmallModel(),
    )


def refusal(saving: CheckpointCallback, trainer: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        saving._refuse_with_shards(trainer)
    return str(refused.value)


def test_shards_are_refused_where_nothing_is_known_of_what_the_ranks_hold() -> None:
    said = refusal(CheckpointCallback(sharded=True), trainer(SingleDeviceStrategy))
    assert said.startswith("Nothing is known to share out: checkpoint.sharded is true")
    CheckpointCallback()._refuse_with_shards(trainer(SingleDeviceStrategy))
    CheckpointCallback(sharded=True)._refuse_with_shards(trainer(DDPStrategy))


@pytest.mark.parametrize(
    ("arguments", "callbacks", "what"),
    [
        ({}, [LearningRateFinder()], "a finder of learning rates"),
        ({}, [WeightAveraging()], "an average of the weights"),
    ],
)
def test_what_does_not_go_with_shards_is_named(
    arguments: dict[str, Any], callbacks: list[Any], what: str
) -> None:
    said = refusal(CheckpointCallback(**arguments), trainer(ModelParallelStrategy, *callbacks))
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

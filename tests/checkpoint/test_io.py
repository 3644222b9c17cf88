import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from support.checkpoint_files import facts, names, small_checkpoint, small_state
from support.limits import HANG_SECS
from torch.utils.data import DataLoader

from savepoint import files
from savepoint.checkpoint import format, manifest, store
from savepoint.checkpoint import io as plugin
from savepoint.checkpoint.io import CheckpointIO
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import (
    CheckpointContentError,
    CheckpointCorruptError,
    CheckpointNotFoundError,
    CheckpointSaveError,
    ConfigError,
)


class Model(LightningModule):
    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(3, width)

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return self.layer(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def trainer(tmp_path: Path, io: Any, epochs: int = 1) -> Trainer:
    return Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, plugins=[io],
    )  # fmt: skip


def batches() -> DataLoader[torch.Tensor]:
    return DataLoader(torch.ones(8, 3), batch_size=4)  # type: ignore[arg-type]


@pytest.fixture(params=[False, True], ids=["at once", "in a thread"])
def io(request: pytest.FixtureRequest) -> Iterator[CheckpointIO]:
    io = CheckpointIO(async_save=request.param)
    yield io
    io.teardown()


@pytest.fixture
def behind() -> Iterator[CheckpointIO]:
    io = CheckpointIO(async_save=True)
    yield io
    io.teardown()


class Gate:
    """Holds a writer at its fsync until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.reached, self.fail = threading.Event(), threading.Event(), False
        fsync = files.os.fsync

        def guarded(descriptor: int) -> None:
            self.reached.set()
            assert self.open.wait(HANG_SECS)
            if self.fail:
                raise OSError(28, "No space left on device")
            fsync(descriptor)

        monkeypatch.setattr(files.os, "fsync", guarded)


@pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers", "ignore:.*log_every_n_steps"
)
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_lightning_trains_saves_and_resumes_through_it(tmp_path: Path, io: CheckpointIO) -> None:
    first = trainer(tmp_path, io)
    first.fit(Model(), batches())
    path = tmp_path / "new" / "deeper" / "mine.ckpt"
    first.save_checkpoint(str(path))
    io.wait()
    read = manifest.verify(path)
    assert (read["step"], read["epoch"], read["exact"]) == (2, 1, False)

    second = trainer(tmp_path, CheckpointIO(), epochs=2)
    second.fit(Model(), batches(), ckpt_path=str(path))
    assert second.global_step == 4
    loaded = Model.load_from_checkpoint(path, map_location="cpu")
    assert torch.equal(loaded.layer.weight, first.model.layer.weight)  # type: ignore[union-attr, arg-type]
    stock = TorchCheckpointIO().load_checkpoint(path)
    assert format.fingerprint(stock["state_dict"]) == format.fingerprint(loaded.state_dict())


def test_the_callbacks_facts_are_the_manifest_and_no_part_of_the_state(
    tmp_path: Path, io: CheckpointIO
) -> None:
    checkpoint = small_state() | {"manifest": facts(30, 0.5, run_id="r")}
    io.save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    io.wait()
    assert manifest.read(tmp_path / "a.ckpt")["run_id"] == "r"
    assert "manifest" in checkpoint
    assert format.fingerprint(io.load_checkpoint(tmp_path / "a.ckpt")) == format.fingerprint(
        small_state()
    )


def test_a_damaged_file_is_refused(tmp_path: Path, io: CheckpointIO) -> None:
    path = small_checkpoint(tmp_path / "a.ckpt").path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointCorruptError, match=str(path)):
        io.load_checkpoint(path)
    assert names(tmp_path) == ["a.ckpt"]


def test_a_file_of_stock_lightning_loads_as_it_is(tmp_path: Path, io: CheckpointIO) -> None:
    TorchCheckpointIO().save_checkpoint(small_state(), tmp_path / "stock.ckpt")
    assert format.fingerprint(io.load_checkpoint(tmp_path / "stock.ckpt")) == format.fingerprint(
        small_state()
    )


def test_what_is_not_supported_is_refused_in_words(tmp_path: Path, io: CheckpointIO) -> None:
    path = small_checkpoint(tmp_path / "a.ckpt").path
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint({}, path, storage_options={"a": 1})
    with pytest.raises(ConfigError, match="Leave weights_only out"):
        io.load_checkpoint(path, weights_only=False)
    with pytest.raises(CheckpointNotFoundError, match="URL"):
        io.load_checkpoint("http://localhost/a.ckpt")
    with pytest.raises(FileNotFoundError, match=r"none\.ckpt"):
        io.load_checkpoint(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointContentError, match="root"):
        io.save_checkpoint({"hyper_parameters": {"root": Path()}}, path)
    assert manifest.verify(path)


def test_a_file_is_removed(tmp_path: Path, io: CheckpointIO) -> None:
    path = small_checkpoint(tmp_path / "a.ckpt").path
    io.remove_checkpoint(str(path))
    io.wait()
    assert not path.exists()


def test_a_save_of_the_store_makes_room_as_the_store_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, io: CheckpointIO
) -> None:
    written: list[int] = []
    io.store = CheckpointStore(tmp_path)
    monkeypatch.setattr(
        CheckpointStore, "write", lambda self, state, facts: written.append(facts["step"])
    )
    io.save_checkpoint(small_state() | {"manifest": facts(30)}, io.store.path(30))
    io.save_checkpoint(small_state() | {"manifest": facts(30)}, tmp_path / "mine.ckpt")
    io.wait()
    assert written == [30]
    assert names(tmp_path) == ["mine.ckpt"]


# -- in a thread ---------------------------------------------------------------------------------


def test_training_may_change_the_state_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: CheckpointIO
) -> None:
    gate = Gate(monkeypatch)
    state, before = small_state(), format.fingerprint(small_state())
    gate_of_encode = threading.Event()
    encode = format.encode

    def late(*arguments: Any) -> Any:
        assert gate_of_encode.wait(HANG_SECS)
        return encode(*arguments)

    monkeypatch.setattr(format, "encode", late)
    behind.save_checkpoint(state, tmp_path / "a.ckpt")
    for tensor in state["state_dict"].values():
        tensor.zero_()
    state["optimizer"]["state"][0]["exp_avg"].zero_()
    state["optimizer"]["param_groups"][0]["lr"] = 99
    state["epoch"] = 99
    assert not (tmp_path / "a.ckpt").exists()
    gate_of_encode.set()
    gate.open.set()
    behind.wait()
    assert format.fingerprint(store.load(tmp_path / "a.ckpt")[0]) == before


def test_a_copy_shares_what_the_state_shares(tmp_path: Path, behind: CheckpointIO) -> None:
    big = torch.randn(100, 100)
    state = {
        "a": big,
        "row": big[3],
        "turned": big.T,
        "parameter": torch.nn.Parameter(big),
        "again": [big],
    }
    behind.save_checkpoint(state, tmp_path / "a.ckpt")
    behind.wait()
    store.write(tmp_path / "b.ckpt", state, facts(0))
    back = store.load(tmp_path / "a.ckpt")[0]
    assert format.fingerprint(back) == format.fingerprint(state)
    assert (back["turned"].stride(), type(back["parameter"])) == ((1, 100), torch.nn.Parameter)
    assert abs((tmp_path / "a.ckpt").stat().st_size - (tmp_path / "b.ckpt").stat().st_size) < 2000
    assert (tmp_path / "a.ckpt").stat().st_size < 50_000


def test_the_memory_of_a_copy_is_used_again() -> None:
    snapshot = plugin._Snapshot()
    first = snapshot.take(small_state(1))["state_dict"]["weight"].data_ptr()
    second = snapshot.take(small_state(2))
    assert second["state_dict"]["weight"].data_ptr() == first
    assert format.fingerprint(second) == format.fingerprint(small_state(2))


def test_a_second_save_waits_for_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: CheckpointIO
) -> None:
    gate = Gate(monkeypatch)
    behind.save_checkpoint(small_state(1), tmp_path / "a.ckpt")
    assert gate.reached.wait(HANG_SECS)
    second = threading.Thread(
        target=behind.save_checkpoint, args=(small_state(2), tmp_path / "b.ckpt")
    )
    second.start()
    second.join(0.1)
    assert second.is_alive()
    gate.open.set()
    second.join(HANG_SECS)
    behind.wait()
    for name, value in (("a.ckpt", 1), ("b.ckpt", 2)):
        assert format.fingerprint(store.load(tmp_path / name)[0]) == format.fingerprint(
            small_state(value)
        )


def test_a_job_runs_after_the_save_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: CheckpointIO
) -> None:
    gate, seen = Gate(monkeypatch), []
    behind.save_checkpoint(small_state(), tmp_path / "a.ckpt")
    behind.submit(lambda: seen.append(manifest.verify(tmp_path / "a.ckpt")["step"]))
    behind.remove_checkpoint(tmp_path / "a.ckpt")
    assert seen == []
    gate.open.set()
    behind.wait()
    assert seen == [30]
    assert names(tmp_path) == []


def test_an_error_in_the_thread_is_raised_in_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: CheckpointIO
) -> None:
    gate, committed = Gate(monkeypatch), []
    gate.fail = True
    behind.save_checkpoint(small_state(), tmp_path / "a.ckpt")
    behind.submit(lambda: committed.append(1))
    behind.raise_pending()
    gate.open.set()
    with pytest.raises(CheckpointSaveError, match=r"a\.ckpt: No space left"):
        behind.wait()
    behind.raise_pending()
    assert committed == []
    assert names(tmp_path) == []
    gate.fail = False
    behind.save_checkpoint(small_state(), tmp_path / "a.ckpt")
    behind.submit(lambda: committed.append(2))
    behind.wait()
    assert committed == [2]


def test_a_save_after_one_that_failed_is_made_and_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: CheckpointIO
) -> None:
    gate = Gate(monkeypatch)
    gate.fail = True
    behind.save_checkpoint(small_state(), tmp_path / "a.ckpt")
    gate.open.set()
    behind._save.exception()  # type: ignore[union-attr]
    gate.fail = False
    with pytest.raises(CheckpointSaveError, match=r"a\.ckpt"):
        behind.save_checkpoint(small_state(), tmp_path / "b.ckpt")
    behind.wait()
    assert names(tmp_path) == ["b.ckpt"]


def test_where_a_save_failed_in_a_way_of_its_own_the_next_is_not_begun(
    behind: CheckpointIO,
) -> None:
    """A rank that is gone: what the others would do together waits for it."""

    begun = threading.Event()

    def save_with_a_dead_rank() -> None:
        begun.wait(HANG_SECS)
        raise RuntimeError("Connection closed by peer")

    behind.write_later(save_with_a_dead_rank)
    begun.set()
    with pytest.raises(RuntimeError, match="closed by peer"):
        behind.settle()
    with pytest.raises(RuntimeError, match="closed by peer"):
        behind.wait()


def test_the_end_waits_for_the_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: CheckpointIO
) -> None:
    gate = Gate(monkeypatch)
    behind.save_checkpoint(small_state(), tmp_path / "a.ckpt")
    threading.Timer(0.05, gate.open.set).start()
    behind.teardown()
    assert manifest.verify(tmp_path / "a.ckpt")
    behind.save_checkpoint(small_state(), tmp_path / "b.ckpt")  # a second fit with the same trainer
    behind.teardown()
    assert manifest.verify(tmp_path / "b.ckpt")

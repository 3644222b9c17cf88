"""What would make the first save fail is told before the first step."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.checkpoint_files import facts, names, small_state
from support.small import SmallModel, fit

from savepoint import files
from savepoint.checkpoint.retention import Retention
from savepoint.checkpoint.store import CheckpointStore
from savepoint.errors import RunDirectoryError

MB = 1_000_000


def failing(code: int) -> Any:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


def with_free(monkeypatch: pytest.MonkeyPatch, free_bytes: int, blocks: int = 1) -> None:
    monkeypatch.setattr(
        os, "statvfs", lambda _: SimpleNamespace(f_bavail=free_bytes, f_frsize=1, f_blocks=blocks)
    )


@pytest.mark.parametrize("call", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_directory_that_a_save_could_not_use_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    monkeypatch.setattr(os, call, failing(code))
    with pytest.raises(RunDirectoryError) as raised:
        CheckpointStore(tmp_path / "checkpoints").preflight(1, 1)
    assert f"{tmp_path / 'checkpoints'} ({os.strerror(code)})" in str(raised.value)
    assert raised.value.exit_code == 2
    assert names(tmp_path / "checkpoints") == []


def test_where_links_fail_a_directory_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    assert CheckpointStore(tmp_path).preflight(1, 1) == ""
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("monitor", "keep_last", "keep_best", "number"),
    [(None, 1, 1, 2), ("val/loss", 1, 1, 3), ("val/loss", 3, 2, 6), ("val/loss", 0, 0, 3)],
)
def test_room_is_needed_for_all_that_retention_keeps_and_one_more(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    monitor: str | None,
    keep_last: int,
    keep_best: int,
    number: int,
) -> None:
    kept = CheckpointStore(
        tmp_path, retention=Retention(keep_last=keep_last, keep_best=keep_best), monitor=monitor
    )
    with_free(monkeypatch, number * MB)
    assert kept.preflight(MB, MB) == ""
    with_free(monkeypatch, number * MB - 1)
    with pytest.raises(
        RunDirectoryError,
        match=rf"{tmp_path} has .* MB free. Expected {number}\.0 MB: {number} more of",
    ):
        kept.preflight(MB, MB)


def test_what_is_there_already_takes_no_more_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = CheckpointStore(tmp_path, monitor="val/loss")
    kept.add(small_state(10), facts(10, 1.0))
    kept.add(small_state(20), facts(20, 2.0))
    with_free(monkeypatch, MB)
    assert kept.preflight(MB, MB) == ""


def test_room_that_may_be_too_little_is_a_warning_with_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 4 * MB)
    warning = CheckpointStore(tmp_path, monitor="val/loss").preflight(MB, 3 * MB)
    assert warning.startswith("Perhaps too little room")
    assert "4.0 MB free" in warning
    assert "9.0 MB: 3 more of about 3.0 MB" in warning


def test_a_file_system_that_does_not_say_how_much_is_free_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_free(monkeypatch, 0, blocks=0)
    assert CheckpointStore(tmp_path).preflight(MB, MB) == ""


def test_temps_of_the_dead_are_swept_before_room_is_looked_for(tmp_path: Path) -> None:
    stale = tmp_path / f".step-00000010.ckpt.tmp-{files._HOST}-{2**22 + 1}-00aa"
    stale.write_bytes(b"half")
    CheckpointStore(tmp_path).preflight(1, 1)
    assert names(tmp_path) == []


def test_a_training_without_room_for_its_checkpoints_makes_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    class Watched(SmallModel):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            taken.append(batch_idx)
            return super().training_step(batch, batch_idx)

    with_free(monkeypatch, 1000)
    with pytest.raises(RunDirectoryError, match="Too little room for checkpoints"):
        fit(tmp_path, model=Watched)
    assert taken == []


def test_the_state_that_an_optimizer_will_have_is_thought_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        CheckpointStore, "preflight", lambda self, *sizes, alone: seen.append(sizes) or ""
    )
    trainer = fit(tmp_path / "fresh", max_epochs=1)
    fit(
        tmp_path / "resumed",
        max_epochs=2,
        ckpt_path=tmp_path / "fresh" / "checkpoints" / "last.ckpt",
    )
    (least, likely), (resumed, resumed_likely) = seen
    parameters = sum(p.numel() * p.element_size() for p in trainer.lightning_module.parameters())
    assert likely == least + 2 * parameters
    assert resumed == resumed_likely, "a resumed optimizer has its state"
    assert least + 2 * parameters <= resumed <= least + 2 * parameters + 64

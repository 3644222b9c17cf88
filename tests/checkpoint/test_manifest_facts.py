"""A sealed manifest may say anything: what is no fact of a checkpoint does not verify, and no
command fails over it.
"""

import contextlib
import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.run_dirs import latest, make_run, say

from savepoint.checkpoint import io, manifest, store
from savepoint.checkpoint.seal import MAGIC, RECORD
from savepoint.errors import CheckpointCorruptError, SavepointError
from savepoint.resume import request

GATHERED = {
    "at": "epoch", "exact": True, "reason": "end", "ended": None, "parent": None, "world_size": 1, "threads": 1,
    "dataset": {"name": "digits", "fingerprint": "f"}, "device": "cpu", "versions": {"torch": "2.15"},
}  # fmt: skip
KEYS = [
    "format_version", "body", "digest", "step", "logged_step", "epoch", "metrics", "monitor", "mode", "score", "best_score",
    "created", "run_id", *GATHERED,
]  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(10**20, 10**400)
    | st.floats()
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def sealed(path: Path, changed: dict[str, Any]) -> None:
    """Writes other facts into the manifest of `path`, and a seal that vouches for them."""
    with path.open("r+b") as file:
        with zipfile.ZipFile(file, "a") as archive:
            facts = json.loads(archive.read(RECORD)) | changed
            record = archive.filelist.pop()
            del archive.NameToInfo[record.filename]
            archive.start_dir, archive._didModify = record.header_offset, True  # type: ignore[attr-defined]
            archive.writestr(zipfile.ZipInfo(RECORD), json.dumps(facts))
            offset = archive.getinfo(RECORD).header_offset
            archive.comment = MAGIC + b"%016x " % offset + b"0" * 64
        file.truncate()
        file.seek(offset)
        seal = hashlib.sha256(file.read()[:-64]).hexdigest().encode()
        file.seek(-64, os.SEEK_END)
        file.write(seal)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path, "a", **GATHERED)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch", [1]), ("epoch", True), ("metrics", [1, 2]), ("metrics", None), ("metrics", {"val/loss": 3}),
        ("metrics", {"val/loss": {"value": {}, "step": 1}}), ("metrics", {"val/loss": {"value": 1.0, "step": "1"}}),
        ("step", "430"), ("step", -1), ("step", 10**30), ("step", None), ("score", {}), ("score", 10**400),
        ("world_size", "x"), ("world_size", 0), ("dataset", "MNIST"), ("dataset", {}), ("created", 3),
        ("versions", []), ("monitor", 3), ("mode", "up"), ("exact", "yes"), ("run_id", 1), ("digest", 1),
    ],
)  # fmt: skip
def test_a_fact_of_another_type_does_not_verify_and_is_named(
    run_dir: Path, key: str, value: Any
) -> None:
    path = latest(run_dir).path
    sealed(path, {key: value})
    for look in (manifest.read, manifest.verify, store.load):
        with pytest.raises(CheckpointCorruptError, match="does not verify") as error:
            look(path)
        assert error.value.reason.startswith("its manifest says")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "[" * 100_000])
def test_what_is_no_json_does_not_verify(
    run_dir: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, dumps = latest(run_dir).path, json.dumps
    monkeypatch.setattr(json, "dumps", lambda facts: dumps(facts).replace('"here"', text))
    sealed(path, {"score": "here"})
    monkeypatch.undo()
    with pytest.raises(CheckpointCorruptError, match="does not verify"):
        manifest.read(path)


def test_what_other_programs_and_older_ones_say_verifies(run_dir: Path) -> None:
    path = latest(run_dir).path
    sealed(
        path,
        {
            "mine": {"a": [None]},
            "epoch": None,
            "monitor": None,
            "mode": None,
            "score": None,
            "dataset": None,
        },
    )
    assert manifest.verify(path)["mine"] == {"a": [None]}
    written = store.write(run_dir / "b.ckpt", {"global_step": 3}, io._facts({"global_step": 3}))
    assert manifest.verify(written.path)["step"] == 3
    assert manifest.verify(store.write(run_dir / "c.ckpt", {}, {"step": 3}).path)["step"] == 3


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(key=st.sampled_from([*KEYS, "mine"]), value=JSON)
def test_no_command_ends_in_a_traceback_whatever_a_manifest_says(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    key: str,
    value: Any,
) -> None:
    run_dir = make_run(tmp_path_factory.mktemp("runs"), "a", **GATHERED)
    path = latest(run_dir).path
    sealed(path, {key: value})
    for words in (
        ["ls", run_dir], ["ls", run_dir, "--json"], ["ls", run_dir.parent], ["show", path],
        ["show", run_dir, "--json"], ["show", path, "--only", "lineage"], ["diff", path, run_dir],
        ["verify", run_dir], ["verify", path], ["verify", path, "--deep"],
        ["gc", run_dir, "--dry-run"], ["report", run_dir],
    ):  # fmt: skip
        assert say(capsys, *words)[0] in (0, 1, 2)
    for target in (path, run_dir):
        with contextlib.suppress(SavepointError):
            request.requested([str(target)])

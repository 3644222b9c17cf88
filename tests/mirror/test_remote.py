"""A place for whole files behind a URL: what every file system must do."""

import errno
import io
import os
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from savepoint.errors import ConfigError, MirrorError
from savepoint.mirror.remote import Ranged, Remote, connect, require


@pytest.fixture(params=["file", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "file":
        return connect(f"file://{tmp_path}/cloud")
    return connect(f"memory://{uuid.uuid4().hex}/cloud")


def test_what_was_put_is_listed_with_its_size_and_read_by_ranges(place: Remote) -> None:
    place.put("run/one", b"0123456789")
    place.put("run/deeper/two", b"2")
    assert place.names("run") == {"one": 10, "deeper": None}
    assert place.read("run/one", 3, 6) == b"345"
    assert place.read("run/deeper/two") == b"2"
    assert place.names("nothing") == {}


def test_a_file_arrives_whole_and_replaces_what_was_there(place: Remote, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content in (b"first" * 1000, b"second"):
        path.write_bytes(content)
        place.put_file(path, "run/file")
        assert place.read("run/file") == content
    assert place.names("run") == {"file": 6}, "no temp is left"


def test_a_download_gives_back_every_byte(
    place: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("savepoint.mirror.remote._PART_BYTES", 7)
    place.put("run/file", bytes(range(100)))
    path = tmp_path / "here"
    path.touch()
    place.download("run/file", 100, path)
    assert path.read_bytes() == bytes(range(100))


def test_a_second_write_of_what_must_be_absent_is_refused(place: Remote) -> None:
    place.put("lease", b"mine", absent=True)
    with pytest.raises(FileExistsError):
        place.put("lease", b"another's", absent=True)
    assert place.read("lease") == b"mine"


def test_what_is_deleted_is_gone_and_may_be_deleted_again(place: Remote) -> None:
    place.put("run/one", b"1")
    place.delete("run/one")
    place.delete("run/one")
    assert place.names("run") == {}
    with pytest.raises(FileNotFoundError):
        place.read("run/one")


def test_a_probe_leaves_nothing_and_says_what_is_ignored(place: Remote) -> None:
    kept = [] if "cloud" in place.url and place.url.startswith("file") else ["If-None-Match"]
    assert place.probe("run") == [*kept, "If-Match"]
    assert place.names("run") == {}


def test_a_probe_finds_a_server_that_gives_back_other_bytes(
    place: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(place), "read", lambda *_: b"other")
    with pytest.raises(MirrorError, match="Other bytes than were asked for"):
        place.probe("run")


def test_the_temps_of_an_upload_that_died_are_swept_and_nothing_else(place: Remote) -> None:
    place.put("run/.step-00000001.ckpt.tmp-0123", b"half")
    place.put("run/.mine", b"1")
    place.put("run/file", b"1")
    place.sweep("run")
    assert place.names("run") == {".mine": 1, "file": 1}


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_file_system_that_fails_in_the_middle_of_an_upload_publishes_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = connect(f"{kind}://{tmp_path}/cloud")
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100_000)
    place.put("run/file", b"before")

    def half(source: Any, target: Any, *_: Any) -> None:
        target.write(source.read(50_000))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if kind == "file":
        monkeypatch.setattr("shutil.copyfileobj", half)
    else:

        def put_half(_: Any, local: str, target: str, **__: Any) -> None:
            with open(local, "rb") as source, place._fs.open(target, "wb") as sink:
                half(source, sink)

        monkeypatch.setattr(type(place._fs), "put_file", put_half)
    with pytest.raises(MirrorError, match="No space left"):
        place.put_file(path, "run/file")
    assert place.read("run/file") == b"before"
    place.sweep("run")
    assert place.names("run") == {"file": 6}


def test_an_object_reads_as_a_file_and_only_where_it_is_read(place: Remote) -> None:
    place.put("file", bytes(range(100)))
    file = Ranged(place, "file", 100)
    assert file.seek(0, io.SEEK_END) == 100
    file.seek(90)
    assert file.read() == bytes(range(90, 100))
    file.seek(5)
    assert file.read(2) == bytes([5, 6])
    assert file.read(0) == b""
    assert file.seen == [(90, bytes(range(90, 100))), (5, bytes([5, 6]))]


@pytest.mark.parametrize("url", ["/mnt/mirror", "outputs", "s3:/bucket", "https://example.org/a"])
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"Not a URL: checkpoint\.mirror is"):
        require(url)


def test_a_protocol_that_nothing_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="No file system for this URL"):
        connect("nonsense://bucket/prefix")


def test_a_package_that_is_missing_is_one_line_before_the_slow_imports() -> None:
    program = (
        "import sys, importlib.util as u; found = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 's3fs' else found(name, *a)\n"
        "from savepoint.config import quick\n"
        "from savepoint.errors import ConfigError\n"
        "try: quick.check(['--config', 'configs/fast.yaml', '--checkpoint.mirror', 's3://bucket/x'])\n"
        "except ConfigError as error: print(error)\n"
        "print('torch' in sys.modules, 'fsspec' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    said, loaded = done.stdout.splitlines()
    assert said.startswith("s3fs is not installed, which s3:// needs: checkpoint.mirror is s3://")
    assert loaded == "False False"

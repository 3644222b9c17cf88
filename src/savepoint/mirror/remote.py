"""A place for whole files behind a URL. The one module that knows fsspec and s3fs.

An object gets its name whole, or not at all:

    s3        one PUT, or a multipart upload whose last call publishes it
    file      a temporary name, synced, then renamed
    others    a temporary name, then the file system's own move
"""

import contextlib
import importlib
import importlib.util
import io
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from savepoint import files
from savepoint.errors import ConfigError, MirrorError

# Protocols that fsspec itself does not bring: the package that does.
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
_PART_BYTES = 16 << 20
# A server that does not answer must not hold up the start, or the end, of a run for minutes.
_S3_OPTIONS = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 5,
        "read_timeout": 20,
        "retries": {"total_max_attempts": 1},
        # Some servers send the sum of the whole object with a part of it. Every byte is looked at
        # here anyway.
        "response_checksum_validation": "when_required",
    },
}
_NOT_TO_BE_WAITED_FOR = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError")


def require(url: str, given: str = "checkpoint.mirror") -> None:
    """Raises ConfigError where `url` is none, or where the package for it is not installed. Imports
    nothing.
    """
    protocol = url.partition("://")[0]
    if not files.is_url(url) or "://" not in url or protocol in ("http", "https"):
        raise ConfigError(
            f"Not a URL: {given} is {url}. Expected s3://BUCKET/PREFIX, or any other that fsspec "
            "knows, such as file:///DIRECTORY. Give one, or null for no mirror."
        )
    package = _PACKAGES.get(protocol)
    if package and importlib.util.find_spec(package) is None:
        extra = "make extras, or " if package == "s3fs" else ""
        named = "'savepoint-lightning[remote]'" if package == "s3fs" else package
        raise ConfigError(
            f"{package} is not installed, which {protocol}:// needs: {given} is {url}. Install it: "
            f"{extra}pip install {named}"
        )


def connect(url: str, given: str = "checkpoint.mirror") -> "Remote":
    """Nothing is asked of the server yet.

    Raises:
        ConfigError: see `require`; or no file system has this protocol.
    """
    require(url, given)
    protocol = url.partition("://")[0]
    kinds: dict[str, type[Remote]] = {"s3": _S3, "s3a": _S3, "file": _Local, "local": _Local}
    return kinds.get(protocol, Remote)(url, given)


class Remote:
    """The files under a URL, each named by a key: its path below the URL.

    Every method raises MirrorError where the server cannot be reached or refuses.
    """

    options: Mapping[str, Any] = {"use_listings_cache": False}
    is_conditional = False
    """Whether `put(absent=True)` is one question to the server, and not two."""
    keeps_tags = False
    """Whether `put(tag=...)` is known, by `probe`, to be refused where another tag is there."""

    def __init__(self, url: str, given: str) -> None:
        self.url = url.rstrip("/")
        core = importlib.import_module("fsspec.core")
        try:
            self._fs, root = core.url_to_fs(self.url, skip_instance_cache=True, **self.options)
        except (ValueError, ImportError) as error:
            raise ConfigError(
                f"No file system for this URL: {given} is {url} ({error}). Expected one that "
                "fsspec knows, such as s3://BUCKET/PREFIX."
            ) from error
        self._root = str(root).rstrip("/")

    def named(self, key: str) -> str:
        """The URL of a key."""
        return f"{self.url}/{key}" if key else self.url

    # -- reading ----------------------------------------------------------------------------------

    def names(self, key: str = "") -> dict[str, int | None]:
        """What lies directly below a key, with its size; None for what has something below it."""
        with self._asking(key):
            try:
                found = self._fs.ls(self._path(key), detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return {}
        below = {}
        for one in found:
            name = str(one["name"]).rstrip("/").rpartition("/")[2]
            below[name] = one["size"] if one["type"] == "file" else None
        return below

    def read(self, key: str, start: int | None = None, end: int | None = None) -> bytes:
        """All of an object or a range of its bytes. Raises FileNotFoundError."""
        with self._asking(key):
            return bytes(self._fs.cat_file(self._path(key), start=start, end=end))

    def download(self, key: str, size: int, into: Path) -> None:
        """Part by part, so that memory holds one of them. Raises FileNotFoundError."""
        with into.open("r+b") as file:
            for start in range(0, size, _PART_BYTES):
                file.write(self.read(key, start, min(start + _PART_BYTES, size)))

    # -- writing ----------------------------------------------------------------------------------

    def put_file(self, path: Path, key: str) -> None:
        """Raises FileNotFoundError where `path` is gone."""
        size = path.stat().st_size
        temp = self._temp(key)
        with self._writing(key):
            try:
                self._fs.makedirs(self._parent(key), exist_ok=True)
                self._fs.put_file(str(path), self._path(temp))
                # A crash before this line costs a temp, which the next start sweeps.
                self._fs.mv(self._path(temp), self._path(key))
            except FileNotFoundError:
                if path.exists():
                    raise
        if not path.exists() and not self._has(key, size):
            raise FileNotFoundError(str(path))

    def put(self, key: str, data: bytes, *, absent: bool = False, tag: str | None = None) -> str:
        """Writes an object, and returns its tag: "" from a file system that has none.

        Args:
            absent: Only where nothing has this key.
            tag: Only where what has this key has this tag.

        Raises:
            FileExistsError: something else is there. A server may ignore both conditions: `probe`.
        """
        with self._writing(key):
            self._fs.makedirs(self._parent(key), exist_ok=True)
            if absent and self._fs.exists(self._path(key)):
                raise FileExistsError(key)
            temp = self._temp(key)
            self._fs.pipe_file(self._path(temp), data)
            self._fs.mv(self._path(temp), self._path(key))
        return ""

    def tag(self, key: str) -> str | None:
        """Of what is there; None where nothing is, or where the file system has no tags."""
        return None

    def delete(self, key: str) -> None:
        with self._writing(key), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def delete_folder(self, key: str) -> None:
        """Where there are any, and nothing lies below this one."""
        with contextlib.suppress(OSError):
            self._fs.rmdir(self._path(key))

    def sweep(self, key: str) -> None:
        """Deletes what a process that died in an upload below this key has left. Only for the
        holder of the lease.
        """
        for name, size in self.names(key).items():
            if size is not None and name.startswith(".") and ".tmp-" in name:
                self.delete(f"{key}/{name}")

    # -- what the server does ---------------------------------------------------------------------

    def probe(self, key: str) -> list[str]:
        """Tries below a key, with a few bytes, all that an upload does; nothing is left.

        Returns:
            What the server ignores, in words.

        Raises:
            MirrorError: it refuses, or gives back other bytes.
        """
        name = f"{key}/.probe-{secrets.token_hex(4)}"
        first = b"a probe of a mirror"
        try:
            tag = self.put(name, first, absent=True)
            is_kept = self._refuses(name, absent=True) and self.is_conditional
            ignored = [] if is_kept else ["If-None-Match"]
            if not tag or not self._refuses(name, tag='"another"'):
                ignored.append("If-Match")
            last = self.put(name, first[::-1])
            if self.read(name, 2, 7) != first[::-1][2:7]:
                raise MirrorError(f"Other bytes than were asked for: {self.named(name)}.")
            if name.rpartition("/")[2] not in self.names(key):
                raise MirrorError(f"Not listed after it was written: {self.named(name)}.")
        finally:
            with contextlib.suppress(MirrorError):
                self.delete(name)
        self.keeps_tags = bool(last) and "If-Match" not in ignored
        return ignored

    def _refuses(self, key: str, *, absent: bool = False, tag: str | None = None) -> bool:
        try:
            self.put(key, b"overwritten", absent=absent, tag=tag)
        except FileExistsError:
            return True
        return False

    # -- errors -----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _asking(self, key: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, FileExistsError, MirrorError):
            raise
        except Exception as error:  # every file system has errors of its own
            raise self._failure(key, error) from error

    @contextlib.contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        with self._asking(key):
            try:
                yield
            except FileNotFoundError as error:  # no such bucket
                raise self._failure(key, error) from error

    def _failure(self, key: str, error: Exception) -> MirrorError:
        refused = isinstance(error, PermissionError | FileNotFoundError)
        refused = refused or type(error).__name__ in _NOT_TO_BE_WAITED_FOR
        reason = " ".join(str(error).split()) or type(error).__name__
        what = f"No access to the mirror: {self.named(key)} ({reason[:300]})."
        return MirrorError(what, refused=refused)

    # -- names ------------------------------------------------------------------------------------

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _parent(self, key: str) -> str:
        return self._path(key).rpartition("/")[0]

    def _temp(self, key: str) -> str:
        parent, slash, name = key.rpartition("/")
        return f"{parent}{slash}.{name}.tmp-{secrets.token_hex(4)}"

    def _has(self, key: str, size: int) -> bool:
        parent, _, name = key.rpartition("/")
        return self.names(parent).get(name) == size


class _Local(Remote):
    """`file://`, a directory that several machines mount, say: as durable as a save."""

    is_conditional = True

    def put_file(self, path: Path, key: str) -> None:
        with path.open("rb") as source, self._writing(key):
            target = Path(self._path(key))
            with files.rewriting(target) as file:
                shutil.copyfileobj(source, file)

    def put(self, key: str, data: bytes, *, absent: bool = False, tag: str | None = None) -> str:
        target = Path(self._path(key))
        with self._writing(key):
            if not absent:
                with files.rewriting(target) as file:
                    file.write(data)
                return ""
            files.make_directory(target.parent)
            temp = Path(self._path(self._temp(key)))
            try:
                temp.write_bytes(data)
                os.link(temp, target)
            finally:
                temp.unlink(missing_ok=True)
        return ""


class _S3(Remote):
    """S3 and what speaks its language. Where: AWS_ENDPOINT_URL; as whom: AWS_ACCESS_KEY_ID and the
    other ways of AWS.
    """

    is_conditional = True
    options = _S3_OPTIONS

    def __init__(self, url: str, given: str) -> None:
        super().__init__(url, given)
        self._fs.retries = 2

    def put_file(self, path: Path, key: str) -> None:
        path.stat()
        with self._asking(key):
            try:
                self._fs.put_file(
                    str(path), self._path(key), chunksize=_PART_BYTES, max_concurrency=2
                )
            except FileNotFoundError as error:
                if path.exists():
                    raise self._failure(key, error) from error
                raise

    def put(self, key: str, data: bytes, *, absent: bool = False, tag: str | None = None) -> str:
        conditions = {"IfNoneMatch": "*"} if absent else {}
        if tag is not None:
            conditions["IfMatch"] = tag
        with self._writing(key):
            try:
                answer = self._call("put_object", key, Body=data, **conditions)
            except OSError as error:
                if conditions and _is_condition(error):
                    raise FileExistsError(key) from error
                raise
        return str(answer.get("ETag") or "")

    def tag(self, key: str) -> str | None:
        with self._asking(key):
            try:
                return str(self._fs.info(self._path(key), refresh=True)["ETag"])
            except FileNotFoundError:
                return None

    def delete_folder(self, key: str) -> None:
        """S3 has none."""

    def sweep(self, key: str) -> None:
        """Ends the multipart uploads of a process that was killed: nobody sees their parts, and
        they cost money.
        """
        bucket, prefix = self._place(key)
        # Some servers say that there is no such upload where there is none at all.
        with self._asking(key), contextlib.suppress(FileNotFoundError):
            found = self._fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=f"{prefix}/")
            for one in found.get("Uploads") or []:
                self._fs.call_s3(
                    "abort_multipart_upload",
                    Bucket=bucket,
                    Key=one["Key"],
                    UploadId=one["UploadId"],
                )

    def _call(self, method: str, key: str, **arguments: Any) -> dict[str, Any]:
        bucket, name = self._place(key)
        answer: dict[str, Any] = self._fs.call_s3(method, Bucket=bucket, Key=name, **arguments)
        return answer

    def _place(self, key: str) -> tuple[str, str]:
        bucket, _, name = self._path(key).partition("/")
        return bucket, name


def _is_condition(error: OSError) -> bool:
    """Whether a server refused a write because of its condition."""
    answer = getattr(error.__cause__, "response", None) or {}
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return isinstance(error, FileExistsError) or status in (409, 412)


class Ranged(io.RawIOBase):
    """An object, to be read as a file: each read asks for its range alone.

    Attributes:
        seen: Where each read began, and its bytes.
    """

    def __init__(self, remote: Remote, key: str, size: int) -> None:
        self._remote = remote
        self._key = key
        self._size = size
        self._position = 0
        self.seen: list[tuple[int, bytes]] = []

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        begin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, begin + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._size, self._position + size)
        if end <= self._position:
            return b""
        data = self._remote.read(self._key, self._position, end)
        self.seen.append((self._position, data))
        self._position += len(data)
        return data

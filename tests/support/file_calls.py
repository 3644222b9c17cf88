"""The calls of this process that change files, seen one by one: those of `os`, and the writes of
files that it opens.

For tests that kill at a call, let it fail or cut it short, and for tests that look at the order of
the calls.
"""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = (
    "open", "mkdir", "write", "pwrite", "fsync", "fdatasync", "truncate", "ftruncate", "replace", "rename", "link",
    "symlink", "unlink", "remove", "rmdir",
)  # fmt: skip
TWO_PATHS = ("replace", "rename", "link", "symlink")


@dataclass(frozen=True)
class Call:
    """A call that is about to be made.

    Attributes:
        name: As in `os`; "write" for a file's too.
        path: What it changes: of a rename the old name, of a link the new one.
        target: The new name of a rename.
        size: Bytes of a write.
        make: Makes it; a write, with so many of its bytes.
    """

    name: str
    path: Path
    target: Path | None
    size: int
    make: Callable[[int], Any]

    def go(self) -> Any:
        return self.make(self.size)

    def half(self) -> Any:
        return self.make(self.size // 2)


Watch = Callable[[Call], Any]


@contextmanager
def watched(under: Path, watch: Watch) -> Iterator[None]:
    """Every call that changes a file at or below `under` goes to `watch`, which makes it or not,
    and gives its result.
    """
    seen = _Seen(under.resolve(), watch)
    calls = {(os, name): seen.in_os(name, getattr(os, name)) for name in NAMES}
    calls |= {(io, "open"): seen.open, (builtins, "open"): seen.open}
    before = {(module, name): getattr(module, name) for module, name in calls}
    for (module, name), call in calls.items():
        setattr(module, name, call)
    try:
        yield
    finally:
        for (module, name), call in before.items():
            setattr(module, name, call)


class _Seen:
    def __init__(self, under: Path, watch: Watch) -> None:
        self.under, self.watch = under, watch
        self.open_before = io.open
        self.names: dict[int, Path] = {}  # of descriptors

    def in_os(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def seen(*arguments: Any, **options: Any) -> Any:
            paths = [self.path(argument) for argument in arguments[: 2 if name in TWO_PATHS else 1]]
            if name in ("link", "symlink"):
                paths = paths[1:]
            size = len(arguments[1]) if name in ("write", "pwrite") else 0

            def make(count: int) -> Any:
                if size:
                    return call(arguments[0], arguments[1][:count], *arguments[2:])
                return call(*arguments, **options)

            result = self.see(name, paths, size, make)
            if name == "open":
                self.names[result] = paths[0]
            return result

        return seen

    def see(self, name: str, paths: list[Path], size: int, make: Callable[[int], Any]) -> Any:
        path, target = paths[0], paths[-1] if len(paths) > 1 else None
        if not path.is_relative_to(self.under):
            return make(size)
        return self.watch(Call(name, path, target, size, make))

    def path(self, named: Any) -> Path:
        """Absolute, but the last name as it is: it may be a link."""
        if isinstance(named, int):
            return self.names.get(named, Path())
        path = Path(os.fsdecode(named))
        return path.parent.resolve() / path.name

    def open(
        self, file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any
    ) -> Any:
        """As io.open; what is opened to be written is seen, and so is each write that reaches the
        system.
        """
        if not set(mode) & set("wax+"):
            return self.open_before(file, mode, buffering, *text, **options)
        see, path = self.see, self.path(file)

        class Raw(io.FileIO):
            def write(self, data: Any) -> Any:
                write, view = super().write, memoryview(data).cast("B")
                return see("write", [path], len(view), lambda count: write(view[:count]))

        def make(_: int) -> Raw:
            kept = {name: value for name, value in options.items() if name in ("closefd", "opener")}
            return Raw(file, mode.translate({ord("b"): None, ord("t"): None}), **kept)

        raw = make(0) if isinstance(file, int) else see("open", [path], 0, make)
        self.names[raw.fileno()] = path
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        kept = {
            name: value
            for name, value in options.items()
            if name in ("encoding", "errors", "newline")
        }
        return io.TextIOWrapper(buffered, *text[:3], line_buffering=buffering == 1, **kept)
